"""The README's programs run as they stand, in order, in one interpreter."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_programs_of_the_readme_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["flow_dist"].sample().shape == (2,)
    assert set(namespace["guide"].median()) == {"mu", "tau", "theta"}
