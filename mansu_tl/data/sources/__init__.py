"""Where tasks come from: one file a format, each registered by name."""

from mansu_tl.data.sources import rows, jsonl, csv, tofu, choices, counterfact, lre, lume, muse, rwku, circuits, pocket  # noqa: F401, I001 - in the order in which they are listed
from mansu_tl.data.sources.choices import Choice, read_choices
from mansu_tl.data.sources.circuits import read_circuit_pairs
from mansu_tl.data.sources.counterfact import Request, read_counterfact
from mansu_tl.data.sources.lre import lre_requests
from mansu_tl.data.sources.lume import LumeItem, read_lume
from mansu_tl.data.sources.muse import MuseItem, read_muse, read_passages
from mansu_tl.data.sources.records import Record, read_records
from mansu_tl.data.sources.registry import Source, beside, load_task, register_source, source, sources
from mansu_tl.data.sources.rows import rows_reader
from mansu_tl.data.sources.rwku import Probe, read_rwku, read_rwku_utility
from mansu_tl.data.sources.rwku_utility import (
    Factuality,
    Fluency,
    Reasoning,
    Truthfulness,
    read_rwku_factuality,
    read_rwku_fluency,
    read_rwku_reasoning,
    read_rwku_truthfulness,
)

__all__ = [
    "Choice",
    "Factuality",
    "Fluency",
    "LumeItem",
    "MuseItem",
    "Probe",
    "Reasoning",
    "Record",
    "Request",
    "Source",
    "Truthfulness",
    "beside",
    "load_task",
    "lre_requests",
    "read_choices",
    "read_circuit_pairs",
    "read_counterfact",
    "read_lume",
    "read_muse",
    "read_passages",
    "read_records",
    "read_rwku",
    "read_rwku_factuality",
    "read_rwku_fluency",
    "read_rwku_reasoning",
    "read_rwku_truthfulness",
    "read_rwku_utility",
    "register_source",
    "rows_reader",
    "source",
    "sources",
]


def __dir__() -> list[str]:
    return sorted(__all__)
