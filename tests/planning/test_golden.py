"""All large configs are planned for three machines and say what their golden texts say."""

import pytest

from tests.planning import golden

WRITTEN = [name for name in golden.NAMES if (golden.FOLDER / f"{name}.txt").is_file()]


@pytest.mark.skipif(
    not golden.installed(), reason=f"needs libtpu {golden.LIBTPU}.*, as in the extra plan"
)
@pytest.mark.parametrize("name", WRITTEN)
def test_the_golden_plan_is_up_to_date(name):
    assert golden.text(name) == (golden.FOLDER / f"{name}.txt").read_text(), (
        f"the plan changed; if it was meant, run `python -m tests.planning.golden {name}` and commit the difference"
    )
