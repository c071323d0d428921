"""Token files made of text: the tokens that the tokenizer itself gives, whole files, or a line."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from bigbatch.data import tokenize
from bigbatch.mistake import Mistake
from tests.conftest import REPOSITORY
from tests.data.test_tokens import data_of, opened

MARK = "<|endoftext|>"
TEXTS = {"b.txt": f"The first story.\nIt ends.{MARK}The second, naïve 🙂.", "a.txt": "Alone.\r\n",
         "deeper/c.txt": f"{MARK}{MARK}Another 1234 {MARK}", "none.txt": "", "notes.md": "not read"}
IN_ORDER = ("Alone.\r\n", "The first story.\nIt ends.", "The second, naïve 🙂.", "Another 1234 ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE tokenizer, as GPT-2's, in a file."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="tokenizers is not installed (pip install tokenizers)")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["The first story, the second story. It ends."] * 10, (
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=[MARK, "<|pad|>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return made, path


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "text"


@pytest.mark.parametrize("characters", (1, 7, 10**6))
def test_the_tokens_are_those_of_the_tokenizer(trained, folder, tmp_path, monkeypatch, characters):
    """However much is read and tokenized at once."""
    made, path = trained
    monkeypatch.setattr(tokenize, "READ_AT_ONCE", characters)
    monkeypatch.setattr(tokenize, "AT_ONCE", characters)
    output = tmp_path / "new" / "train.bin"
    told = tokenize.tokenize(path, output, [folder])
    mark = made.token_to_id(MARK)
    expected = [token for text in IN_ORDER for token in [*made.encode(text).ids, mark]]
    assert np.fromfile(output, "<u2").tolist() == expected
    assert told == json.loads((tmp_path / "new/train.bin.json").read_text()) == {
        "dtype": "uint16", "tokens": len(expected), "documents": 4, "separator": mark,
        "bytes": sum(len(text.encode()) for text in IN_ORDER),
        "vocabulary": made.get_vocab_size(),
        "tokenizer": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert sorted(found.name for found in output.parent.iterdir()) == [
        "train.bin", "train.bin.json"]
    # Text that holds no separator comes back from the tokens, byte for byte.
    first = np.fromfile(output, "<u2").tolist().index(mark)
    assert made.decode(expected[:first]) == IN_ORDER[0]


def test_the_command_makes_what_a_run_reads(trained, folder, tmp_path):
    made, path = trained
    for name in ("train", "test"):
        done = subprocess.run(
            [sys.executable, "-m", "bigbatch.data.tokenize", f"--tokenizer={path}",
             f"--output={tmp_path / name}.bin", folder / "b.txt", folder / "deeper"],
            text=True, capture_output=True, cwd=REPOSITORY, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
    assert f"data.options.separator={made.token_to_id(MARK)}, data.options.bytes_per_token=" in (
        done.stdout)
    data = data_of("tokens", tmp_path, classes=made.get_vocab_size(), length=4,
                   separator=made.token_to_id(MARK))
    train, _ = opened(data)
    found = np.fromfile(tmp_path / "train.bin", "<u2")
    np.testing.assert_array_equal(train.take([0, 1])[:, :-1].reshape(-1), found[:8])
    done = subprocess.run(
        [sys.executable, "-m", "bigbatch.data.tokenize", f"--tokenizer={path}",
         f"--output={tmp_path}/test.bin", folder], text=True, capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "test.bin is there already: take another name, or remove it." in done.stderr


def test_a_large_vocabulary_takes_four_bytes_a_token(trained, folder, tmp_path):
    import tokenizers

    words = {f"w{number}": number for number in range(70_000)} | {MARK: 70_000}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([MARK])
    made.save(str(tmp_path / "words.json"))
    (tmp_path / "some.txt").write_text("w69999 w5 w66000")
    told = tokenize.tokenize(tmp_path / "words.json", tmp_path / "o.bin", [tmp_path / "some.txt"])
    assert told["dtype"] == "uint32" and told["vocabulary"] == 70_001
    assert np.fromfile(tmp_path / "o.bin", "<u4").tolist() == [69_999, 5, 66_000, 70_000]


def test_what_cannot_be_done_is_one_line_and_leaves_no_file(trained, folder, tmp_path):
    _, path = trained
    (tmp_path / "bad.txt").write_bytes(b"good, then \xff\xfe")
    (tmp_path / "empty").mkdir()
    for arguments, text in (
        ((path, tmp_path / "o.npy", [folder]), "o.npy; its name must end in .bin"),
        ((tmp_path / "no.json", tmp_path / "o.bin", [folder]), "no.json cannot be read"),
        ((folder / "a.txt", tmp_path / "o.bin", [folder]), "a.txt is no tokenizer.json"),
        ((path, tmp_path / "o.bin", [folder], "</s>"),
         r"'</s>', which .* does not know; its special tokens are <.endoftext.>, <.pad.>"),
        ((path, tmp_path / "o.bin", [tmp_path / "empty"]), "empty has no .txt files"),
        ((path, tmp_path / "o.bin", [tmp_path / "none.txt"]), "none.txt cannot be read"),
        ((path, tmp_path / "o.bin", [folder / "none.txt"]), "there is no text in"),
        ((path, tmp_path / "o.bin", [folder, tmp_path / "bad.txt"]), "bad.txt is no text in UTF-8"),
        ((path, folder / "a.txt/o.bin", [folder]), "a.txt.* cannot be written"),
    ):
        with pytest.raises(Mistake, match=text) as refused:
            tokenize.tokenize(*arguments)
        assert "\n" not in str(refused.value)
        assert not list(tmp_path.glob("o.bin*"))


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(Mistake, match=r"pip install tokenizers, or '\.\[text\]'"):
        tokenize.tokenize(tmp_path / "t.json", tmp_path / "o.bin", [tmp_path])


