"""Pages whose address says what they are: lists of domains, addresses and words, decided as datatrove decides."""

import functools

import pyarrow as pa

from smoljax.curation import schema
from smoljax.curation.filters import url_lists


def url(
    batch: pa.RecordBatch, *, lists: str | None = None, min_soft_words: int = 2
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Removes pages by their address, as the URLFilter of datatrove 0.10 does; rows without one are kept.

    Reasons, in the order of the decision:
      url:domain               the registered domain (example.co.uk) is listed.
      url:subdomain            the host (www.example.co.uk) is listed.
      url:url                  the address itself is listed.
      url:hard_blacklisted     a banned word stands in the address between characters that are no letter or digit.
      url:soft_blacklisted     `min_soft_words` different words of the soft list stand so.
      url:blacklisted_subword  a banned string is in what is left when all but ASCII letters and digits is taken out.

    Domains and words are compared in the case of the address, with lists in lower case, so that upper case passes;
    only the last rule ignores case. So it is in datatrove, and in the data that was made with it.

    Args:
      batch: with a column `url`, RAW or DOCUMENT.
      lists: folder with the lists (`url_lists.load`); None for those that the installed datatrove ships.
      min_soft_words: words of the soft list that an address needs to be removed.
    """
    loaded = url_lists.load(lists)
    addresses = batch.column("url").to_pylist()
    rules = [address and _rule(address, loaded, min_soft_words) for address in addresses]
    return schema.part(batch, [f"url:{rule}" if rule else None for rule in rules])


def _rule(address: str, lists: url_lists.Lists, min_soft_words: int) -> str | None:
    host = _suffixes()(address)
    if host.top_domain_under_public_suffix in lists.domains:
        return "domain"
    if host.fqdn in lists.domains:
        return "subdomain"
    if address in lists.urls:
        return "url"
    words = set(url_lists.words(address))
    if not words.isdisjoint(lists.banned_words):
        return "hard_blacklisted"
    if len(words & lists.soft_banned_words) >= min_soft_words:
        return "soft_blacklisted"
    text = url_lists.squashed(address)
    if any(subword in text for subword in lists.banned_subwords):
        return "blacklisted_subword"
    return None


@functools.cache
def _suffixes():
    """With the list of public suffixes that the package ships: never a fetched one, which would change by the day."""
    from tldextract import TLDExtract  # Here, for it brings a library for downloads, and 10 MB.

    return TLDExtract(cache_dir=None, suffix_list_urls=())
