"""Draws the site's pictures: no background, colours for light and dark."""

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

# Of middle lightness, so that they stand out from white and from black.
BLUE, ORANGE, GREEN, PURPLE = "#3b7ddd", "#d9661f", "#2f8f4e", "#9560c8"
GREY, LINE = "#7c7c7c", "#8a8a8a"

plt.rcParams.update(
    {
        "svg.hashsalt": "keras_spectral",  # the same file each time
        "font.size": 12,
        "text.color": GREY,
        "axes.edgecolor": LINE,
        "axes.labelcolor": GREY,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": GREY,
        "ytick.color": GREY,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


def all_pictures(folder: pathlib.Path, study, rows: list[dict]) -> None:
    """Writes every picture of the site as SVG."""
    for draw in (pair, tree, views, host, spectrum, gates, transfer, blocks):
        save(draw(), folder / f"{draw.__name__}.svg")
    save(accuracy(study, rows), folder / "accuracy.svg")


def save(figure, path: pathlib.Path) -> None:
    figure.savefig(
        path, transparent=True, bbox_inches="tight", metadata={"Date": None}
    )
    plt.close(figure)


def canvas(width: float, height: float):
    """Axes without axes: one unit is one inch."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text="", color=GREY, size=12, **style):
    """A filled box with white text, or an outline with coloured text."""
    filled = style.pop("filled", True)
    style.setdefault("zorder", 3)
    axes.add_patch(
        plt.Rectangle(
            (x, y),
            width,
            height,
            facecolor=color if filled else "none",
            edgecolor=color,
            linewidth=1.6,
            **style,
        )
    )
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        color="white" if filled else color,
        ha="center",
        va="center",
        fontsize=size,
        zorder=4,
    )


def arrow(axes, start, end, color=LINE, style="-|>", **options):
    axes.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": style,
            "color": color,
            "linewidth": 1.6,
            "shrinkA": 0,
            "shrinkB": 0,
            **options,
        },
    )


def note(axes, x, y, text, color=GREY, size=11, **options):
    options = {"ha": "center", "va": "center"} | options
    axes.text(x, y, text, color=color, fontsize=size, **options)


def pair():
    """K beside A and B, to scale for a 768 x 768 kernel and rank 32."""
    figure, axes = canvas(8, 3.5)
    side, thin = 2.4, 0.1
    box(axes, 0.3, 0.6, side, side, "K\nfrozen\n768 x 768", GREY)
    note(axes, 1.5, 0.3, "589,824 weights")
    note(axes, 3.1, 1.8, "+", size=22)
    box(axes, 3.6, 0.6, thin, side, "", ORANGE)
    note(axes, 3.65, 3.2, "A", ORANGE, 14)
    box(axes, 4.1, 0.6 + side - thin, side, thin, "", ORANGE)
    note(axes, 5.3, 3.2, "B", ORANGE, 14)
    note(
        axes,
        5.35,
        1.7,
        "49,152 weights train:\nrank 32, drawn to scale",
        ORANGE,
        12,
    )
    note(axes, 5.3, 0.85, "y = x K + x A B", size=13)
    return figure


# Question, what to take at a yes; the rest go on to the next question.
TREE = (
    (
        "Do you keep very many\nadapters, such as one\na user?",
        "vera\nor lidb, ia3",
    ),
    (
        "Does the model not fit\ninto memory?",
        "lora on int4:\nquantize_with_lora",
    ),
    ("Is it a convolutional\nnetwork?", "conv_lora\nor spectral"),
    (
        "Must it get smaller,\nnot only adapt?",
        "decaying_lora\nor compress_model",
    ),
    ("Are subjects trained\napart and used at once?", "orthogonal_adaptation"),
    ("Are there only a few\nexamples?", "deep_lora"),
)


def tree():
    """Questions from top to bottom; a yes leads to the right."""
    step, height = 1.25, len(TREE) * 1.25 + 0.9
    figure, axes = canvas(8, height)
    for at, (question, method) in enumerate(TREE):
        y = height - 1.05 - at * step
        box(axes, 0.3, y, 3.5, 0.9, question, BLUE, 11, filled=False)
        arrow(axes, (3.8, y + 0.45), (5.0, y + 0.45))
        note(axes, 4.4, y + 0.62, "yes", GREEN)
        box(axes, 5.0, y, 2.7, 0.9, method, GREEN, 11)
        arrow(axes, (2.05, y), (2.05, y - step + 0.9))
        note(axes, 2.35, y - 0.17, "no", ORANGE)
    y = height - 1.05 - len(TREE) * step
    box(axes, 0.3, y + 0.1, 7.4, 0.8, "lora", GREEN, 13)
    note(
        axes,
        4,
        y - 0.15,
        "not good enough? raise the rank, then dora or bottleneck",
        size=11,
    )
    return figure


def views():
    """Three layers whose kernels are one matrix n_in x n_out."""
    figure, axes = canvas(9, 3.9)
    columns = (
        ("Dense", "kernel (n_in, n_out)", "n_in", "n_out"),
        ("EinsumDense", '"btd,dnh->btnh"', "d", "n h"),
        ("Conv2D 3 x 3", "patches of the input", "3 3 c", "filters"),
    )
    for at, (name, about, rows, cols) in enumerate(columns):
        x = 0.5 + 3 * at
        note(axes, x + 1.2, 3.7, name, BLUE, 14)
        note(axes, x + 1.2, 3.4, about, size=11)
        box(axes, x + 0.3, 1.2, 1.0, 1.7, "K", GREY, 15)
        note(axes, x + 0.8, 3.05, cols, size=11)
        note(axes, x + 0.15, 2.05, rows, rotation=90, size=11)
        box(axes, x + 1.5, 1.2, 0.16, 1.7, "", ORANGE)
        note(axes, x + 1.58, 3.05, "A", ORANGE)
        box(axes, x + 1.8, 2.74, 1.0, 0.16, "", ORANGE)
        note(axes, x + 2.3, 3.05, "B", ORANGE)
    how = (
        "x A: a product",
        "x A: over the letters\nthat are summed",
        "x A: a convolution\nwith r filters",
    )
    ups = (
        "then (x A) B",
        "then B to the letters\nthat are new",
        "then a 1 x 1",
    )
    for at, (down, up) in enumerate(zip(how, ups)):
        note(axes, 1.7 + 3 * at, 0.8, down, ORANGE, 11)
        note(axes, 1.7 + 3 * at, 0.3, up, ORANGE, 11)
    return figure


def host():
    """A host holds its base and named adapters with strengths."""
    figure, axes = canvas(8.6, 3.9)
    box(axes, 1.3, 0.2, 5.9, 3.5, "", BLUE, filled=False)
    note(axes, 4.25, 3.45, "host: takes the layer's place, name and path", BLUE)
    box(axes, 2.1, 2.45, 2.2, 0.7, "base, frozen", GREY)
    rows = (
        ("mrpc", "1.0", ORANGE),
        ("cola", "0.0", LINE),
        ("rte", "0.3", ORANGE),
    )
    for at, (name, strength, color) in enumerate(rows):
        y = 1.65 - 0.6 * at
        box(axes, 2.1, y, 2.2, 0.48, name, color, 12)
        note(axes, 4.95, y + 0.24, f"x {strength}", color, 12)
        arrow(axes, (1.55, y + 0.24), (2.1, y + 0.24), color)
        arrow(axes, (4.3, y + 0.24), (4.65, y + 0.24), color, "-")
        arrow(axes, (5.3, y + 0.24), (6.0, y + 0.24), color)
    arrow(axes, (0.3, 2.8), (2.1, 2.8))
    arrow(axes, (4.3, 2.8), (6.0, 2.8))
    axes.plot([1.55, 1.55], [0.69, 2.8], color=LINE, linewidth=1.6)
    axes.plot([6.0, 6.0], [0.69, 2.8], color=LINE, linewidth=1.6)
    box(axes, 6.15, 2.5, 0.85, 0.6, "f( sum )", PURPLE, 10)
    arrow(axes, (6.0, 2.8), (6.15, 2.8))
    arrow(axes, (7.0, 2.8), (8.3, 2.8))
    note(axes, 0.45, 3.05, "x", size=14)
    note(axes, 8.0, 3.05, "y", size=14)
    return figure


def spectrum():
    """Singular values of a kernel, and what each mode moves."""
    figure, axes = plt.subplots(figsize=(8, 3.3), layout="constrained")
    values = 3 * np.arange(1, 41) ** -0.6
    at = np.arange(1, 41)
    axes.bar(at[:8], values[:8], color=ORANGE, width=0.7)
    axes.bar(at[8:], values[8:], color=LINE, width=0.7)
    axes.set_xlabel("singular directions of a kernel, largest first")
    axes.set_ylabel("singular value")
    axes.set_ylim(0, 3.9)
    axes.text(
        9.2,
        2.45,
        "rank=8: the directions that the adapter trains\n"
        '"additive" moves their vectors, rank (n_in + n_out) weights\n'
        '"rotate" turns them among themselves, 2 rank^2 + rank\n'
        '"values" and gates stretch them, rank',
        color=ORANGE,
        fontsize=11,
    )
    axes.text(22, 1.0, "the others stay as they are", fontsize=11)
    return figure


def gates():
    """Gates as numbers of a kernel, or of each example."""
    figure, axes = canvas(8.6, 3.1)
    rng = np.random.default_rng(3)
    note(axes, 2.0, 2.85, '"gated_spectral"', BLUE, 13)
    note(axes, 2.0, 2.5, "one number for each direction", size=11)
    for at, gate in enumerate((0.8, 0.0, 0.45, 0.0, 0.0, -0.6, 0.0, 0.0)):
        box(axes, 0.4 + 0.42 * at, 0.9, 0.3, 1.2, "", LINE, filled=False)
        box(
            axes,
            0.4 + 0.42 * at,
            1.5 + min(gate, 0) * 0.7,
            0.3,
            max(abs(gate) * 0.7, 0.01),
            "",
            ORANGE if gate else LINE,
        )
    note(axes, 2.0, 0.55, "S becomes S (1 + g)")
    note(axes, 6.5, 2.85, '"conditional_spectral"', BLUE, 13)
    note(axes, 6.5, 2.5, "a row for each example: open or closed", size=11)
    open_ = rng.random((4, 8)) < 0.3
    for row in range(4):
        for at in range(8):
            box(
                axes,
                4.9 + 0.42 * at,
                1.85 - 0.36 * row,
                0.34,
                0.28,
                "",
                ORANGE if open_[row, at] else LINE,
                filled=bool(open_[row, at]),
            )
    note(axes, 6.5, 0.4, "a network shared by all layers decides")
    return figure


def transfer():
    """The original's factor falls, a thin pair takes over."""
    figure, axes = plt.subplots(figsize=(8, 3.1), layout="constrained")
    steps = np.linspace(0, 100, 200)
    decay = np.clip(1 - (steps - 20) / 60, 0, 1)
    axes.plot(steps, decay, color=GREY, linewidth=2.5)
    axes.fill_between(steps, decay, 1, color=ORANGE, alpha=0.35)
    axes.axvline(20, color=LINE, linestyle=":")
    axes.axvline(80, color=LINE, linestyle=":")
    axes.set_xticks([20, 80], ["start_step", "end_step"])
    axes.set_yticks([0, 1])
    axes.set_ylabel("d, the original's factor")
    axes.text(22, 0.35, "what is left of\nthe original K", fontsize=12)
    axes.text(60, 0.72, "the pair A B\nmakes up for it", color=ORANGE)
    axes.text(83, 0.1, "finalize_transfer:\nA and B alone", fontsize=11)
    axes.set_xlim(0, 108)
    return figure


def blocks():
    """Where the adapters of a block sit."""
    figure, axes = canvas(10, 2.6)
    arrow(axes, (0.1, 1.3), (9.9, 1.3))
    box(axes, 0.6, 0.8, 2.0, 1.0, "attention", GREY)
    box(axes, 0.6, 2.1, 2.0, 0.4, "prefix", ORANGE, 11)
    arrow(axes, (1.6, 2.1), (1.6, 1.8), ORANGE)
    box(axes, 2.8, 1.05, 1.1, 0.5, "houlsby", GREEN, 11)
    box(axes, 4.3, 0.8, 2.0, 1.0, "feed-forward", GREY)
    box(axes, 4.3, 0.1, 2.0, 0.45, "parallel", GREEN, 11)
    arrow(axes, (4.1, 1.3), (4.3, 0.33), GREEN)
    arrow(axes, (6.3, 0.33), (6.5, 1.3), GREEN)
    box(axes, 6.6, 1.05, 1.5, 0.5, "houlsby\nor pfeiffer", GREEN, 10)
    box(axes, 8.3, 1.05, 1.2, 0.5, "post\nor red", PURPLE, 10)
    return figure


def accuracy(study, rows: list[dict]):
    """The study's own picture, by `benchmarks/study.py`."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    study.draw(rows, axes)
    return figure
