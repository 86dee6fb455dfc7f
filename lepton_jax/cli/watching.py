"""Options of `lepton serve` about what is watched, and the meter that they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lepton_jax.errors import SettingError
from lepton_jax.launch.options import reader

if TYPE_CHECKING:
    from lepton_jax.ship.watch import Meter, Price

LEVELS = ("debug", "info", "warning", "error")
# Requests that went well are not logged unless somebody asks: at thousands a second
# their lines cost more than the requests.
LEVEL = "warning"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    group = parser.add_argument_group("what is watched (GET /metrics, for Prometheus)")
    group.add_argument(
        "--log-level",
        type=reader(str, choices=LEVELS),
        default=LEVEL,
        metavar="|".join(LEVELS),
        help=(
            "least level of the log's lines of JSON on standard error; a request that"
            " went well is info, a mistake of its client a warning, ours an error"
            f" (default: {LEVEL})"
        ),
    )
    group.add_argument(
        "--price-per-hour",
        type=reader(float),
        metavar="MONEY",
        help="of the machine, for the price of 1,000 predictions",
    )
    group.add_argument(
        "--price-per-kwh",
        type=reader(float),
        metavar="MONEY",
        help="of electricity that is paid for apart from the machine",
    )
    group.add_argument(
        "--currency",
        default="USD",
        help="of these prices (default: USD)",
    )


def meter_of(options: argparse.Namespace) -> Meter:
    """Return the meter of a server.

    Spans go to OpenTelemetry's collector if the environment names one.

    Raises:
      SettingError: a price is below zero.
      MissingExtraError: a library is not installed.
    """
    # only here: the libraries may be missing
    from lepton_jax.ship.watch import Meter, Traces, open_log, traces

    return Meter(
        price=_price(options),
        log=open_log(level=options.log_level),
        traces=Traces() if traces.wanted() else None,
    )


# ---- internals ----


def _price(options: argparse.Namespace) -> Price | None:
    from lepton_jax.ship.watch import Price

    amounts: dict[str, Any] = {
        "--price-per-hour": options.price_per_hour,
        "--price-per-kwh": options.price_per_kwh,
    }
    for flag, amount in amounts.items():
        if amount is not None and not 0 <= amount < float("inf"):
            raise SettingError(
                f"{flag} is {amount:g}",
                where=f"command line, {flag}",
                remedy="give what it costs, such as 1.20",
            )
    if all(amount is None for amount in amounts.values()):
        return None
    return Price.per_hour(
        options.price_per_hour or 0.0,
        options.price_per_kwh or 0.0,
        options.currency,
    )
