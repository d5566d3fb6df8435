"""Which rows and columns of a parameter go where in the decoder's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from hybrid_engine.ops.gather import UnpackEntry, gather_unpack, unpack_plan

Range = tuple[int, int]  # [begin, end)


@dataclass(frozen=True)
class Piece:
    """A slice of a parameter, and the row of the destination at which it starts."""

    rows: Range
    columns: Range
    to_row: int


@dataclass(eq=False)
class Placement:
    """One parameter on its way to one tensor of the decoder.

    The pieces' rows count in the destination seen as a matrix with as many columns as they have;
    a vector has one column.
    """

    source: nn.Parameter
    shape: tuple[int, ...]  # of the whole source
    destination: nn.Parameter  # its `data` is what is written
    to_shape: tuple[int, ...]
    pieces: Sequence[Piece]
    lora: LowRank | None = None  # is added on the way


@dataclass(eq=False)
class LowRank:
    """scale * B A, of the source's whole shape, or of its transpose."""

    a: nn.Parameter  # (rank, columns)
    b: nn.Parameter  # (rows, rank)
    scale: float
    transposed: bool = False  # the source is stored so, as GPT-2's Conv1D is

    def factors(self, whole: dict[nn.Parameter, Tensor]) -> tuple[Tensor, Tensor]:
        """A and B of the source as it is stored."""
        a, b = whole[self.a], whole[self.b]
        return (b.t().contiguous(), a.t().contiguous()) if self.transposed else (a, b)


@dataclass(eq=False)
class Unpacking:
    """Placements out of one bucket (world, L), where `starts` says (start, length) of a source."""

    placements: list[Placement]
    starts: dict[nn.Parameter, tuple[int, int]]
    _plan: Tensor = field(init=False)
    _loras: list[LowRank] = field(init=False)

    def __post_init__(self) -> None:
        self._loras = [p.lora for p in self.placements if p.lora is not None]
        number = {lora: i for i, lora in enumerate(self._loras)}
        entries = []
        for index, placement in enumerate(self.placements):
            start, length = self.starts[placement.source]
            rows = placement.shape[0]
            columns = placement.shape[1] if len(placement.shape) == 2 else 1
            for piece in placement.pieces:
                entries.append(
                    UnpackEntry(
                        start, length, rows, columns, index, piece.to_row, *piece.rows,
                        *piece.columns, number[placement.lora] if placement.lora else -1,
                    )
                )  # fmt: skip
        self._plan = unpack_plan(entries)

    def run(self, bucket: Tensor, factors: dict[nn.Parameter, Tensor]) -> None:
        """Write every destination; `factors` holds the low-rank ones, whole."""
        destinations = [
            p.destination.data.view(-1, p.pieces[0].columns[1] - p.pieces[0].columns[0])
            for p in self.placements
        ]
        pairs = [lora.factors(factors) for lora in self._loras]
        gather_unpack(
            bucket,
            self._plan,
            destinations,
            [a for a, _ in pairs],
            [b for _, b in pairs],
            [lora.scale for lora in self._loras],
        )


def whole(shape: tuple[int, ...]) -> list[Piece]:
    """All of a vector or matrix."""
    return [Piece((0, shape[0]), (0, shape[1] if len(shape) == 2 else 1), 0)]
