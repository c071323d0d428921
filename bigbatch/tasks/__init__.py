"""What is learned: the arrays of an example, what the network sees of them, and how it is judged.

`config.task` is the dotted path of a task: of a module (or of an object) with these functions, of
which the first four must be there. All are pure but `load` and `about`. B is the examples that one
device takes in one pass: in training whole ghost batches, `config.ghost_size` neighbours each, in
evaluation any number. So nothing may depend on how many there are, nor mix the examples of one
ghost batch with those of another, and what is evaluated mixes none.

    fields(config) -> {name: Field(shape, dtype)}
        The arrays of one example as `load` has them, such as images uint8 (H, W, C) and labels
        int32 (). The names examples, record, usable and seed are taken.

    prepare(config, fields_B, keys_B, train) -> (inputs_B, targets_B)
        `fields_B` are arrays by name, with the examples on the first axis, and `keys_B` one random
        key an example. `inputs_B` is what the network is called with, an array or a tree of
        them, and `targets_B` what `losses` is called with; the first axis of all arrays is that
        of the examples. `train` is a Python bool: False for evaluation.

    losses(config, outputs_B, targets_B) -> {name: (values_B, weights_B)}
        For each quantity the sum over each example and its weight, both (B,) in float32 (float64
        where `config.dtype` is): a mean over tokens sums over an example's tokens, and its weight
        is how many of them count. What is reported is sum of values / sum of weights, over the
        whole batch or the whole test set. "loss" must be there. "objective", if it is there, is
        differentiated in its place, and is not reported (label smoothing, auxiliary losses): the
        gradient is that of the sum of its values / sum of its weights. `outputs_B` is whatever the
        network returns. Padding and skipped examples need no care: the update gives them no value
        and no weight.

    load(config) -> InMemory(train, test) or Streamed(train, test)
        The data. In memory are NumPy arrays by name, examples on the first axis. Streamed are
        readers, see `data.examples.Reader`, which `config.data.streaming` asks for.

    derived(config, means) -> {name: number}
        May be left out. Numbers that follow from the means of a batch or of the test set, such as
        a perplexity from the "loss", to be reported beside them; `means` are floats by name.

    tokens(config) -> int
        May be left out. The tokens of an example. Lengths may then be stated in tokens, and
        positions are shown in tokens beside epochs.

    about(config) -> {name: JSON value}
        May be left out. What tells the data from other data of the same config, such as a version
        or a checksum; each start of a run writes it into timing.jsonl.

Keys of a task's own are in `config.task_options`. `config.data.num_classes` is what the network
function gets as its first argument: the width of its output, whatever the task makes of it.
docs/tasks.md has an example.
"""

from bigbatch.data.examples import Field, InMemory, Reader, Streamed

__all__ = ["Field", "InMemory", "Reader", "Streamed"]
