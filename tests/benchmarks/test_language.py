"""The language program: data, training, and what it refuses."""

import json
import shutil

import equinox as eqx
import jax
import numpy as np
import pytest

import deqjax
from benchmarks.common import training
from benchmarks.language import __main__ as program
from benchmarks.language._config import Config, preset_fields
from benchmarks.language._data import TrainBatches, ValidWindows, load_corpus
from benchmarks.language._errors import UsageError
from benchmarks.language._models import make_model, token_nll
from benchmarks.language._output import read_config
from benchmarks.language._tokens import ByteTokenizer, FileTokenizer, WordTokenizer
from benchmarks.language._train import load_run
from tests.benchmarks.language_runs import (
    losses,
    options,
    saved_steps,
    text as text,
)


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """Optax's Adam leans on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# --- data -----------------------------------------------------------------------------


def test_batches_are_windows_of_the_text_and_depend_on_the_step_alone():
    tokens = np.arange(100, dtype=np.uint8)
    batches = TrainBatches(tokens, 4, 9, seed=3)
    assert batches[5].shape == (4, 10)
    assert np.all(np.diff(batches[5]) == 1)
    np.testing.assert_array_equal(batches[5], TrainBatches(tokens, 4, 9, seed=3)[5])
    assert np.any(batches[5] != batches[6])


def test_every_validation_token_counts_once():
    tokens = ByteTokenizer().encode(bytes(range(100, 131)))
    windows = ValidWindows(tokens, 4, 10, most=99)
    targets = np.concatenate([w[k > 0][:, 1:].ravel() for w, k in windows.batches])
    assert sorted(targets) == list(range(101, 131))
    assert windows.size == 30


@pytest.mark.slow
def test_the_standard_library_is_split_by_files():
    corpus = load_corpus("stdlib", None, 128)
    assert corpus.vocab_size == 256
    share = len(corpus.valid.ids) / (len(corpus.train) + len(corpus.valid.ids))
    assert 0.01 < share < 0.15
    again = load_corpus("stdlib", None, 128)
    np.testing.assert_array_equal(corpus.valid.ids, again.valid.ids)


def test_words_of_wikitext_are_sorted_by_frequency(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text(" the cat <unk> the \n the dog \n")
    (tmp_path / "wiki.valid.tokens").write_text(" the bird \n the dog \n")
    corpus = load_corpus("wikitext-103", tmp_path, 2)
    vocabulary = json.loads(corpus.files["vocabulary.json"])
    assert vocabulary == ["the", "<eos>", "<unk>", "cat", "dog"]
    assert corpus.vocab_size == 5
    assert corpus.train.tolist() == [0, 3, 2, 0, 1, 0, 4, 1]
    assert corpus.valid.ids.tolist() == [0, 2, 1, 0, 4, 1]
    assert corpus.valid.sizes.tolist() == [4, 5, 1, 4, 4, 1]
    assert corpus.valid.words.tolist() == [1] * 6


TEXT = "Ein Bär, zwei Bären.\n\n  und 中文 text\n"


@pytest.mark.parametrize("lines", [False, True])
def test_bytes_count_the_words_of_a_text(lines):
    tokens = ByteTokenizer(lines_are_words=lines).encode(TEXT.encode())
    assert bytes(tokens.ids) == TEXT.encode()
    assert tokens.words.sum() == len(TEXT.split()) + lines * TEXT.count("\n")


def test_rare_words_become_unknown():
    tokenizer = WordTokenizer(b"a a b c c <unk>\n", least=2)
    assert tokenizer.vocabulary == ["<unk>", "a", "c", "<eos>"]
    assert tokenizer.encode(b"a d\n").ids.tolist() == [1, 0, 3]


def test_words_that_no_vocabulary_holds_are_refused():
    with pytest.raises(UsageError, match="`d` occurs in the validation text"):
        WordTokenizer(b"a b\n", least=1).encode(b"a d\n")
    with pytest.raises(UsageError, match="no word occurs 3 times"):
        WordTokenizer(b"a b\n", least=3)
    with pytest.raises(UsageError, match="not UTF-8"):
        WordTokenizer(b"\xff", least=1)


def test_a_tokenizer_file_accounts_for_every_byte_and_word(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT] * 5, vocab_size=280)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json", lines_are_words=True)
    tokens = tokenizer.encode(TEXT.encode())
    assert made.decode(tokens.ids.tolist()) == TEXT
    assert tokens.sizes.sum() == len(TEXT.encode())
    assert tokens.sizes.min() >= 0
    assert tokens.words.sum() == len(TEXT.split()) + TEXT.count("\n")
    assert len(tokens.ids) < len(TEXT.encode())
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match=r"is no tokenizer\.json"):
        FileTokenizer(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "--data: nowhere is neither"),
        (["--data", "wikitext-103"], "--data-dir: missing"),
        (["--data", "wikitext-103", "--data-dir", "."], "wiki.train.tokens"),
        (["--length", "5000"], "fewer than the 5001"),
        (["--tokens", "letters"], "--tokens: got 'letters'"),
        (["--processes", "here"], "--processes: got 'here'"),
        (["--processes", "localhost:1,2/2"], "the last one is number 1"),
        (["--mesh", "rows=2"], "--mesh: got 'rows=2'"),
        (["--mesh", "data=64"], "there are only"),
        (["--heads", "3"], "num_heads"),
        (["--heads", "8", "--positions", "rotary"], "8 / 8 = 1"),
        (["--model", "deq", "--positions", "rotary"], "--positions: got rotary"),
        (["--model", "deq", "--tied"], "--tied: of no use"),
    ],
)
def test_refusals_name_the_option_and_write_nothing(
    tmp_path, text, capsys, more, message
):
    assert program.main(options(tmp_path, text, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        load_corpus(str(tmp_path / "empty"), None, 8)


def test_runs_of_before_dropout_are_read(tmp_path):
    fields = preset_fields("tiny")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": fields, "tokens": {}}))
    assert not {"dropout", "positions", "tied"} & set(fields)
    found, _ = read_config(path)
    assert (found.dropout, found.positions, found.tied) == (0.0, "learned", False)


# --- whole runs -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", ["revdeq", "deq", "explicit"])
def test_a_run_learns_and_leaves_its_results(tmp_path, text, capsys, model):
    more = ["--steps", "200", "--eval-every", "100", "--model", model]
    given = options(tmp_path, text, *more)
    assert program.main(given) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert last == f"bits per byte: {results['bits_per_byte']:.4f}"
    assert results["bits_per_byte"] < 6  # of 8 for a uniform guess
    rows = training.read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 201))
    assert (out / "figure.png").stat().st_size > 10_000
    # Again: refused without --resume, of another configuration refused with it.
    assert program.main(given) == 2
    assert "add --resume" in capsys.readouterr().err
    assert program.main([*given, "--resume", "--lr", "0.5"]) == 2
    assert "lr = 0.003" in capsys.readouterr().err
    assert program.main([*given, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.slow
def test_a_run_with_dropout_resumes_bit_for_bit(tmp_path, text, capsys):
    more = "--dropout 0.3 --positions rotary --tied --steps 20"
    given = options(tmp_path, text, *more.split(), "--save-every", "10", "--keep", "9")
    given += ["--eval-every", "20", "--accumulate", "2"]
    assert program.main(given) == 0
    out = tmp_path / "out"
    want = losses(out)
    # Back to what was there after step 10.
    shutil.rmtree(out / "checkpoints" / "20")
    (out / "results.json").unlink()
    assert saved_steps(out) == [10]
    for change in (["--dropout", "0.2"], ["--positions", "learned"]):
        assert program.main([*given, "--resume", *change]) == 2
    assert "positions = 'rotary'" in capsys.readouterr().err
    assert program.main([*given, "--resume"]) == 0
    assert losses(out) == want
    # Evaluations are without dropout, and so is the model that is loaded.
    trained, config = load_run(out)
    corpus = load_corpus(str(text), None, config.length)
    windows = ValidWindows(corpus.valid, 4, config.length, config.eval_windows)
    total = weight = 0.0
    for batch, weights in windows.batches:
        nll, _ = eqx.filter_jit(token_nll)(trained, batch)
        total += float((nll.mean(1) * weights).sum())
        weight += float(weights.sum())
    assert total / weight == pytest.approx(want[-1][2], rel=1e-5)


@pytest.mark.slow
def test_models_have_equal_numbers_of_parameters():
    for preset in ("tiny", "small"):
        counts = {}
        for name in ("revdeq", "deq", "explicit"):
            config = Config(**{**preset_fields(preset), "model": name})
            shapes = eqx.filter_eval_shape(lambda c=config: make_model(c, 256))
            counts[name] = deqjax.nn.count_parameters(shapes)
        assert max(counts.values()) < 1.01 * min(counts.values())
