"""Types of the compiled module; its documentation is in precal_ext/ops.py and in its own docstrings."""

from typing import Any

FORMAT_VERSION: int
OUTLIER_UNIT: float
OUTLIER_BLOCK: int
MAX_LEVEL: int
MAX_CAPACITY: int

def build_info() -> dict[str, Any]: ...
def cpu_isa() -> str: ...
def force_isa(name: str) -> None: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def limit_names() -> list[str]: ...
def measure_limit(name: str, seconds: float = 0.1, megabytes: int = 256, isa: str = "") -> dict[str, Any]: ...
def outlier_blocks(K: int, segment: int = 0) -> list[tuple[int, int]]: ...
def num_outlier_blocks(K: int, segment: int = 0) -> int: ...
def outlier_segment(K: int, segment: int = 0) -> int: ...
def words_per_row(K: int, bits: int) -> int: ...
def prepacked_bytes(
    N: int,
    K: int,
    bits: int,
    group_size: int,
    c: int,
    grid_size: int,
    split: bool,
    scale_dtype: str,
    segment: int = 0,
) -> int: ...
def cuda_prepacked_bytes(
    N: int,
    K: int,
    bits: int,
    group_size: int,
    c: int,
    grid_size: int,
    split: bool,
    scale_dtype: str,
    segment: int = 0,
) -> int: ...
def __getattr__(name: str) -> Any: ...  # the ops, on numpy arrays and DLPack tensors
