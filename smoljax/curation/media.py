"""What a file holds, told from its ending: the reader's format and the media type of its documents."""

UNKNOWN = "application/octet-stream"

_DOCUMENTS = {
    "text/html": (".html", ".htm", ".xhtml"),
    "application/pdf": (".pdf",),
    "text/plain": (".txt", ".text"),
    "text/x-rst": (".rst",),
    "text/markdown": (".md", ".markdown"),
    "text/x-python": (".py", ".pyi"),
    "text/x-c": (".c", ".h"),
    "text/x-c++": (".cc", ".cpp", ".cxx", ".hpp"),
    "text/x-java": (".java",),
    "text/javascript": (".js", ".mjs"),
    "text/x-typescript": (".ts",),
    "text/x-go": (".go",),
    "text/x-rust": (".rs",),
    "text/x-shellscript": (".sh",),
    "application/sql": (".sql",),
}

# Longest ending first where one is the end of another.
_CONTAINERS = (
    (".warc.gz", "warc_gz"),
    (".warc.wet.gz", "warc_gz"),
    (".warc.wet", "warc"),
    (".warc", "warc"),
    (".jsonl.gz", "jsonl_gz"),
    (".jsonl.zst", "jsonl_zst"),
    (".jsonl", "jsonl"),
    (".parquet", "parquet"),
    (".zip", "zip"),
    (".tar.gz", "tar"),
    (".tar.bz2", "tar"),
    (".tar.xz", "tar"),
    (".tgz", "tar"),
    (".tar", "tar"),
)

_BY_ENDING = {ending: kind for kind, endings in _DOCUMENTS.items() for ending in endings}


def classify(name: str) -> tuple[str, str | None]:
    """(format, media type) of a file name; the media type of a container's documents is None."""
    lower = name.lower()
    for ending, format in _CONTAINERS:
        if lower.endswith(ending):
            return format, "text/plain" if format.startswith(("jsonl", "parquet")) else None
    return "file", media_type(lower)


def media_type(name: str) -> str:
    """Media type by ending; UNKNOWN when the ending is not known."""
    lower = name.lower()
    dot = lower.rfind(".")
    return _BY_ENDING.get(lower[dot:], UNKNOWN) if dot >= 0 else UNKNOWN
