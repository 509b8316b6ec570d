"""Operations on a whole model: wrap, switch, merge, count, print."""
