"""The url filter: datatrove's decisions and reasons, on real addresses and on ones made of its lists."""

import gzip
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("datatrove", reason="the oracle of the tests is not installed")

import huggingface_hub
from datatrove.data import Document
from datatrove.pipeline.filters import URLFilter
from tldextract import TLDExtract

from smoljax.curation import chain, schema
from smoljax.curation.filters import url, url_lists
from smoljax.errors import SmoljaxError
from tests.curation import corpora

DECISIONS = {
    "domain",
    "subdomain",
    "url",
    "hard_blacklisted",
    "soft_blacklisted",
    "blacklisted_subword",
    None,
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """datatrove's filter with all its lists, and with the public suffixes that tldextract ships."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("assets"))
        patch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", folder)
        oracle = URLFilter()
        oracle.tldextractor = TLDExtract(cache_dir=None, suffix_list_urls=())
        oracle.download_data()
        yield oracle


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The hashed lists, made once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        url_lists.load.cache_clear()
        yield url_lists.cache_folder()
        url_lists.load.cache_clear()


def pages(addresses: list[str | None]) -> pa.RecordBatch:
    rows = [
        {"id": str(i), "source": "s", "path": "p", "url": address, "media_type": "text/html"}
        for i, address in enumerate(addresses)
    ]
    return pa.RecordBatch.from_pylist([row | {"content": b"<p>x"} for row in rows], schema.RAW)


def ours(addresses: list[str | None], **arguments) -> list[str | None]:
    kept, removed = url(pages(addresses), **arguments)
    decided = dict.fromkeys(kept.column("id").to_pylist())
    decided |= dict(zip(removed.column("id").to_pylist(), removed.column("reason").to_pylist()))
    return [decided[str(i)] for i in range(len(addresses))]


def theirs(oracle: URLFilter, addresses: list[str]) -> list[str | None]:
    verdicts = [oracle.filter(Document(text="", id="", metadata={"url": a})) for a in addresses]
    return [None if verdict is True else f"url:{verdict[1]}" for verdict in verdicts]


def variants(host: str, number: int) -> list[str]:
    """Addresses on a host, each of another form."""
    forms = (
        f"http://{host}/",
        f"https://www.{host}/a/b.html?q=1#top",
        f"HTTP://{host.upper()}/",
        f"https://user:pass@{host}:8443/x",
        f"//{host}",
        host,
        f"https://a.b.{host}.",
        f"ftp://{host}:21",
        f"http://{host[1:]}/{host}",
        f"http://example.com/?u=http://{host}",
        f"  http://{host}/ ",
        f"http://{host.replace('.', '。', 1)}/",
    )
    return [forms[(number + i) % len(forms)] for i in range(4)]


def listed(oracle: URLFilter) -> list[str]:
    """Addresses around 500 listed hosts, every kind of them, and 200 listed addresses."""
    assets = huggingface_hub.cached_assets_path("datatrove", "filters", "url_filter")
    domains = (assets / "domains").read_text().split()[::10]
    odd = [d for d in domains if re.fullmatch(r"[\d.]+", d) or "xn--" in d or d.count(".") > 3]
    draw = random.Random(5)
    hosts = draw.sample(domains, 300) + draw.sample(odd, 200)
    found = [a for number, host in enumerate(hosts) for a in variants(host, number)]
    for address in draw.sample(sorted(oracle.block_listed_url), 200):
        found += [address, f"http://{address}", address.upper(), address[:-1], address + " "]
    return found


def planted(oracle: URLFilter) -> list[str]:
    """Every word of the three lists in eight places of an address."""
    forms = (
        "http://example.com/{}",
        "http://example.com/a-{}.html",
        "http://example.com/{}s",
        "http://{}.example.com/",
        "http://x{}x.org/",
        "https://example.com/?q={}&r=1",
        "https://{}:{}@example.com",
        "example.com/é{}é",
    )
    soft = sorted(oracle.soft_banned_words)
    words = sorted(oracle.banned_words) + soft + sorted(oracle.banned_subwords)
    found = [form.replace("{}", word) for word in words for form in forms]
    found += [f"http://example.com/{word.upper()}" for word in words]
    found += [f"http://example.com/{'-'.join(word)}" for word in words]
    found += [f"http://example.com/{a}/{b}" for a, b in zip(soft, [*soft[1:], soft[0]])]
    return [*found, *(f"http://example.com/{word}/{word}" for word in soft)]


def test_addresses_made_of_the_lists(oracle):
    addresses = listed(oracle) + planted(oracle)
    decided = ours(addresses)
    assert decided == theirs(oracle, addresses)
    assert {reason and reason.removeprefix("url:") for reason in decided} == DECISIONS
    assert min(Counter(decided).values()) > 50
    assert ours(addresses, min_soft_words=1) != decided


@pytest.mark.network
def test_addresses_on_real_pages(oracle):
    found = {
        link.decode()
        for _, page in corpora.pages("web", 29) + corpora.pages("en", 600)
        for link in re.findall(rb"https?://[!-;=?-~]+(?=[\"'])", page)
    }
    addresses = sorted(found)
    assert len(addresses) > 2000
    assert ours(addresses) == theirs(oracle, addresses)


PARTS = st.sampled_from(
    [
        *("http://", "https://", "//", "www.", "user:pass@", "@", ":80", "/", "?", "#", "&", ".", "-"),
        *("example.com", "example.co.uk", "blogspot.com", "127.0.0.1", "[::1]", "xn--p1ai", "рф", "com"),
        *("sex", "SEX", "teen", "porn", "pornhub.com", "Porn", "xxx", "girls", "hot", "s-e-x", "é", "%20", ""),
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PARTS, PARTS, st.text(max_size=3)), min_size=1, max_size=8).map("".join))
@example("http://")
@example("http://[")
@example("http://[::1]/porn")
@example("\ufeffhttp://pornhub.com")
@example("http://a\0b.com")
@example("http://" + "a" * 300 + ".com")
@example("x" * 1_000_000)
def test_addresses_of_any_form(oracle, address):
    if address:
        assert ours([address]) == theirs(oracle, [address])


def test_rows_without_an_address_are_kept():
    assert ours([None, "", "http://pornhub.com/"]) == [None, None, "url:domain"]


def test_it_runs_on_pages_before_extraction():
    preset = {"order": ("url", "extract"), "url": {"min_soft_words": 3}}
    chain.check("presets.web", preset)
    (step,) = chain.build(preset).pages
    kept, removed = step.run(pages(["http://example.com/", "http://pornhub.com/"]))
    assert kept.schema == schema.RAW
    assert removed.column("reason").to_pylist() == ["url:domain"]


@pytest.fixture
def folder(tmp_path):
    """Lists of our own, laid out as datatrove's."""
    (tmp_path / "banned_words.txt").write_text("# of one\nfoul\n#fair\n")
    (tmp_path / "soft_banned_words.txt").write_text("mild\nweak\n\n")
    (tmp_path / "banned_subwords.txt").write_text("very bad\n")
    (tmp_path / "domains").write_text("listed.org\nhost.example.net\n# no.com\n\n")
    (tmp_path / "urls").write_text("http://example.com/listed\n")
    return tmp_path


OWN = {
    "http://www.listed.org/": "domain",
    "http://host.example.net/": "subdomain",
    "http://example.com/listed": "url",
    "http://example.com/foul": "hard_blacklisted",
    "http://example.com/mild-weak": "soft_blacklisted",
    "http://example.com/so-VERY-bad-it-is": "blacklisted_subword",
    "http://example.com/fair-mild-FOUL": None,
    "http://127.0.0.1/": None,
    "http://no.com/": None,
}


def test_lists_of_a_folder_as_files_and_as_an_archive(folder):
    expected = [reason and f"url:{reason}" for reason in OWN.values()]
    assert ours(list(OWN), lists=str(folder)) == expected
    packed = folder / "packed"
    packed.mkdir()
    for words in folder.glob("*.txt"):
        words.rename(packed / words.name)
    with tarfile.open(packed / "url_filterblacklistsv9.tar.gz", "w:gz") as archive:
        archive.add(folder / "domains", "./domains")
        archive.add(folder / "urls", "urls")
    assert ours(list(OWN), lists=str(packed)) == expected


@pytest.mark.parametrize("name", ["domains", "urls", "banned_words.txt", "soft_banned_words.txt"])
def test_a_missing_list_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(SmoljaxError, match=f"{folder} holds no .*{name}.*: the url filter needs"):
        ours(["http://x.org"], lists=str(folder))


def test_a_missing_member_and_a_missing_package_are_named(folder, monkeypatch):
    with tarfile.open(folder / "url_filterblacklistsv9.tar.gz", "w:gz") as archive:
        archive.add(folder / "domains", "domains")
    with pytest.raises(SmoljaxError, match=r"v9\.tar\.gz holds no urls: the url filter needs"):
        ours(["http://x.org"], lists=str(folder))
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(SmoljaxError, match="reads its lists from the package datatrove, which is"):
        url_lists.load.__wrapped__(None)


def test_a_damaged_archive_is_named(folder):
    (folder / "url_filterblacklistsv9.tar.gz").write_bytes(gzip.compress(b"no archive" * 99)[:50])
    with pytest.raises(SmoljaxError, match=r"v9\.tar\.gz is damaged \(.*\): install"):
        ours(["http://x.org"], lists=str(folder))


def test_a_changed_list_and_a_damaged_cache_are_made_again(folder, cache):
    ours(["http://listed.org"], lists=str(folder))
    made = set(cache.glob("url-domains-*.npy"))
    (folder / "domains").write_text("listed.org\n")
    url_lists.load.cache_clear()
    ours(["http://listed.org"], lists=str(folder))
    (new,) = set(cache.glob("url-domains-*.npy")) - made
    content = new.read_bytes()
    for damaged in (b"", content[:-8], content[:-1] + b"\xff"):
        new.write_bytes(damaged)
        url_lists.load.cache_clear()
        assert ours(["http://listed.org"], lists=str(folder)) == ["url:domain"]
        assert new.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_named(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "urls"))
    url_lists.load.cache_clear()
    with pytest.raises(SmoljaxError, match=r"cannot keep its lists in .*: set XDG_CACHE_HOME to"):
        ours(["http://x.org"], lists=str(folder))


def test_processes_that_start_together_share_one_file(folder):
    script = (
        "import sys\nfrom smoljax.curation.filters import url_lists\n"
        "print('listed.org' in url_lists.load(sys.argv[1]).domains)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in started] == ["True"] * 3
