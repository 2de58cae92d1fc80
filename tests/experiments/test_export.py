"""A policy exported as a user does."""

from tests import programs, tiny


def test_the_program_and_what_it_refuses(tmp_path):
    base, out = tiny.tiny_policy(tmp_path / "sft" / "policy"), tmp_path / "out"
    before = {path.name for path in tmp_path.iterdir()}
    flags = (f"--checkpoint={base.parent}", f"--out={out}")
    assert f"RESULT out={out} heads=none" in programs.succeed("export", *flags)
    done = programs.run("export", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: --out={out}: is there already")
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}
