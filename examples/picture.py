"""Draw the picture of the README: `python examples/picture.py`.

It shows a kernel of MiniLM and a LoRA of rank 8 to scale, and what can be done
with a model that has adapters. The picture goes into `docs/_static`.
"""

import argparse
import pathlib

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "_static"
GREY, BLUE, TEXT = "#9ca3af", "#2563eb", "#1f2937"
WIDTH, RANK, SIDE = 384, 8, 144  # of the kernel, of the pair; pixels

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", default=FOLDER / "overview.svg")
args = parser.parse_args()

parts = []


def box(x, y, width, height, color, radius=0):
    parts.append(
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" '
        f'rx="{radius}" fill="{color}"/>'
    )


def write(x, y, text, color=TEXT, size=13, anchor="middle"):
    parts.append(
        f'<text x="{x}" y="{y}" fill="{color}" font-size="{size}" '
        f'text-anchor="{anchor}">{text}</text>'
    )


def arrow(x, y, to_x, to_y):
    parts.append(
        f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{TEXT}" '
        'stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def step(x, y, name, says):
    box(x, y, 168, 46, "#dbeafe", 6)
    write(x + 84, y + 20, name, size=13)
    write(x + 84, y + 37, says, size=11)


thin = SIDE * RANK / WIDTH
box(30, 46, SIDE, SIDE, GREY)
write(30 + SIDE / 2, 122, "K, frozen", "white", 15)
write(195, 125, "+", size=24)
box(218, 46, thin, SIDE, BLUE)
write(220, 208, "A", BLUE, 15)
box(232, 46, SIDE, thin, BLUE)
write(390, 53, "B", BLUE, 15)
write(232, 92, "384 x 384 weights in K,", anchor="start")
write(232, 112, "2 x 8 x 384 in A and B,", anchor="start")
write(232, 132, "drawn to scale", anchor="start")
write(30, 30, "K' = K + s A B", size=16, anchor="start")

step(430, 91, "wrap_model, fit", "A and B train")
for height, name, says in (
    (21, "save_adapters", "a file of 309 KiB"),
    (91, "merge_model", "plain Keras layers"),
    (161, "set_adapters", "switch and mix several"),
):
    arrow(602, 114, 648, height + 23)
    step(652, height, name, says)

picture = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 226"
 width="840" height="226" font-family="Helvetica, Arial, sans-serif" role="img"
 aria-label="A frozen kernel, a thin pair beside it, and what follows">
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"
 markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{TEXT}"/>
</marker></defs>
<rect width="840" height="226" rx="8" fill="white"/>
{"".join(part + chr(10) for part in parts)}</svg>
"""
pathlib.Path(args.out).write_text(picture)
print(f"{args.out}: {len(picture)} bytes")
