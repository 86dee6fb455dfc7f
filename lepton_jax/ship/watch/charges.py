"""What a batch cost, shared out to the requests in it.

    three requests of 3, 1 and 1 rows run in a compiled size of 8, for 4 ms

    request   rows   seconds        of these, for padding
    a         3      4 ms * 3/5     2.4 ms * 3/8
    b         1      4 ms * 1/5     0.8 ms * 3/8
    c         1      4 ms * 1/5     0.8 ms * 3/8

The empty rows are computed as the others are, and nobody else pays for them: a batch
is charged whole, by rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SECONDS_OF_AN_HOUR = 3600
JOULES_OF_A_KWH = 3.6e6
THOUSAND = 1000


@dataclass(frozen=True)
class Price:
    """Money that computing costs.

    Attributes:
      per_second: of the machine, whether it computes or waits.
      per_joule: of electricity that is paid for apart from the machine.
      currency: the unit, as it is shown.
    """

    per_second: float
    per_joule: float = 0.0
    currency: str = "USD"

    @classmethod
    def per_hour(
        cls,
        machine: float,
        per_kwh: float = 0.0,
        currency: str = "USD",
    ) -> Price:
        """Return a price as bills state it: for an hour, and for a kilowatt-hour."""
        return cls(
            machine / SECONDS_OF_AN_HOUR,
            per_kwh / JOULES_OF_A_KWH,
            currency,
        )

    def of(self, seconds: float, joules: float | None) -> float:
        """Return the price of some time; of energy too, where that was measured."""
        return self.per_second * seconds + self.per_joule * (joules or 0.0)


@dataclass(frozen=True)
class Charge:
    """A request's share of the batch that it was in, padding included.

    Attributes:
      rows: of the request.
      seconds: of the devices.
      padding_seconds: the part of `seconds` that went to empty rows.
      joules: estimated from the power while the batch ran; None: not measured.
      money: in the price's currency; None: no price is known.
    """

    rows: int
    seconds: float
    padding_seconds: float
    joules: float | None
    money: float | None


def share_out(
    rows: Sequence[int],
    size: int,
    seconds: float,
    watts: float | None,
    price: Price | None,
) -> list[Charge]:
    """Share a batch out to its requests, by rows.

    Args:
      rows: of each request; at least one row in all.
      size: rows that were computed, empty ones included.
      seconds: that they took.
      watts: power of the machine meanwhile; None: not measured.
      price: None: not known.

    Returns:
      A charge for each request. They add up to the whole batch.
    """
    real = sum(rows)
    empty = (size - real) / size
    charges = []
    for count in rows:
        its_seconds = seconds * count / real
        joules = None if watts is None else watts * its_seconds
        money = None if price is None else price.of(its_seconds, joules)
        charges.append(
            Charge(
                count,
                its_seconds,
                its_seconds * empty,
                joules,
                money,
            )
        )
    return charges
