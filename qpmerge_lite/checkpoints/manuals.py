"""What ``--help`` of each verb says, beside its options."""

from .methods import CALIBRATED, WEIGHTS_ONLY
from .recipes.settings import RULES

MERGE = """
Merge fine-tuned models into one, without training.

BASE is the folder of the model that all EXPERTs were tuned from, in the format of Hugging Face:
config.json with model.safetensors, or with shards and their index. An EXPERT is such a folder, or
one with an adapter of peft for BASE: adapter_config.json with adapter_model.safetensors; or
delta:FILE, a task vector. Each may be at the Hub instead, as hf:owner/name or
hf:owner/name@revision. The merge is written to a folder of the same kind, with the base's shards,
names, dtypes, tokenizer and configuration, so that from_pretrained loads it. merge.json in it says
how it was made.
"""
MERGE_MORE = f"""
methods:
  that look at weights only:
    {", ".join(WEIGHTS_ONLY[:7])},
    {", ".join(WEIGHTS_ONLY[7:])}
  that run the models on calibration inputs (these need transformers):
    {", ".join(CALIBRATED)}
  Options of a method are those of the Python function of that name: help(qpmerge_lite.ties).

calibration:
  Unlabelled inputs of an expert's task, some dozens to some hundreds. SOURCE is one of
    JSON lines (.jsonl), a field "text"; Parquet, a column "text"; plain text, an input a line;
    a folder of pictures, or of folders of them, for models that read pictures; Parquet with a
    column "image" does too;
    a file of a data set at the Hugging Face Hub, hf://datasets/OWNER/NAME@COMMIT/PATH, which is
    the only thing that a network is asked for.
  --column names another field, or two: a pair of texts, as premise,hypothesis. Models with an
  encoder and a decoder read a text and its target: "text" and "target", or --column NAME=A,B.
  Rows with "messages" in place of "text" are chats, written out by the tokenizer's chat template.
  Labels are not read. Of a source with more than N inputs (--samples), N are taken, evenly apart.
  The expert's own tokenizer or processor reads them, or the base's where its folder has none.

adapters:
  LoRA and DoRA are folded into the base tensor by tensor, as peft's merge_and_unload does it, with
  whole layers, biases, embeddings and rows of these that are trained beside them. What is not
  folded is refused by name.

task vectors:
  FILE of delta:FILE is safetensors, or a folder with model.safetensors or with shards and their
  index, without a configuration. Its tensors are differences from BASE, by the base's names; what
  it lacks is unchanged. They are added in float64, and the sum is rounded to the base's dtype, as
  saving the expert in it does. `qpmerge delta` writes such a file.

heads:
  Experts may be classifiers with heads of their own (another number of labels, other labels), on a
  base with any head or none. What base and all experts have under one prefix of their names is the
  backbone, which is merged; every expert's head is kept as it is, in DIR/heads/NAME: config.json,
  the tokenizer where it is another, and head.safetensors. What only the base has stays as it is in
  DIR, which loads as the base does. README.md in DIR has the lines of Python that load it with a
  head. Where all heads have the base's shapes and labels, heads are merged like everything else,
  unless --heads own is given; with --heads merged they always are. A language model's head is no
  task's: it is merged. With calibration, auto chooses by the predictions of the heads. Adapters of
  a classifier keep its head among modules_to_save: it is such a head.

hub:
  Configuration, tokenizer and safetensors are downloaded to where huggingface_hub keeps its files;
  HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are heeded. merge.json has the commit.

moments:
  With qp and regmean on the experts' own inputs, sums over what each expert's layers read stand in
  for its texts: qpmerge moments writes them, once, and no data are needed here, nor transformers.
  They are of one expert alone, and fit any base, other experts, basis and ridge. Where heads are
  kept, those of backbones are taken.

recipes:
  RECIPE is a YAML file of mergekit. Base, models, method and parameters are taken from it, and the
  weights are those of mergekit 0.1.5, of random methods those of its --random-seed N. Methods:
  {", ".join(list(RULES)[:6])},
  {", ".join(list(RULES)[6:])}.
  What is not honoured is refused by its field: adapters, names at the Hub, models made of parts
  of models, other tokenizers than the base's. Reading it needs PyYAML: '.[yaml]'.

files:
  Weights are read from safetensors alone: nothing is unpickled, no code of a checkpoint is run,
  and no network is asked but for hf: names and hf:// sources. Chat templates run in the sandbox
  of transformers. Nothing is written but DIR, all of it or nothing, and what is downloaded. The
  same command on the same machine writes the same bytes.

stopped half-way:
  While DIR is made it is a hidden folder beside it, .DIR.ORDER.partial, named after inputs,
  options and versions. Where a merge is stopped by Ctrl-C, killed, or finds the disk full, the
  files of weights that it has finished are kept there, and the same command goes on from them to
  the same bytes. This helps methods that go tensor by tensor. Those that take calibration keep
  every layer as it is solved: the models are run once more, and no layer is solved twice; esm
  keeps what it has decomposed. Recipes with random numbers, merges by moments, merges by several
  processes, and methods on weights alone that see the whole model at once, as `qpmerge check`
  tells, start anew: these last have made all of the merge before its first file. After a
  refusal of weights, as of NaN, nothing is kept: corrected weights are another order. Another
  command leaves the folder alone and says so; it can be deleted.

several processes:
  torchrun --nproc-per-node N -m qpmerge_lite merge ... shares the forwards of a method that takes
  calibration: each of N processes runs every N-th batch (--batch-size says how large they are; N
  must not be more than there are), sums are added up once for the layers that read one tensor,
  and the merge is that of one process to rounding. Every process holds all models. The first one
  writes DIR, which the others need not see, and all end with its status. A process that is lost,
  or gives no answer for ten minutes, ends all: no DIR then, and the same command starts anew.
  Merges that run no model are made by the first process alone.

costs:
  Memory, and what is read and written, are estimated before a merge, by `qpmerge check` for every
  method; memory and time are measured after it. The time that is left is shown while it runs, on a
  terminal; how long the whole takes is estimated from rates of reading, products and
  decompositions, which are measured for less than a second, and may be off by a factor of two or
  three, more on a busy machine. Methods that run the models leave base and experts in their files
  until a layer is used: what is counted is the process's own memory, and the system lets go of what
  it has of the files where memory is short. Memory that is needed for a moment only may escape the
  measurement. Of adapters, and of experts in another dtype than the base's, a copy of what changes
  is beside DIR meanwhile, without a name. Forwards that wait for a layer take more with more texts.
  --memory SIZE is what the whole process may take, Python and its packages among it. It is held by
  what is estimated, and nothing stops a process that takes more, as where attention holds all its
  scores, which are not counted: forwards then wait in front of blocks only and run these again for
  every layer, as far as it takes: the same bytes, in more time than was estimated. A merge that
  needs more in any case is refused at once, with what it needs and what for; of several processes
  each may take so much. Another SIZE goes on from what is kept.

exit status:
  0    the merge is there
  1    it was refused, with the reason on the error stream; there is no DIR then
  2    the command was not understood
  130  it was stopped by Ctrl-C; 143: by the signal to end

examples:
  qpmerge merge base french=tuned/fr german=tuned/de --out merged
  qpmerge merge base tuned/fr tuned/de --out merged --method ties --option density=0.1
  qpmerge merge base fr=tuned/fr de=tuned/de --out merged \\
      --calibration fr=fr.jsonl --calibration de=de.txt
  qpmerge moments tuned/fr --calibration fr.jsonl --out fr.moments.safetensors
  qpmerge merge base fr=tuned/fr de=tuned/de --out merged \\
      --moments fr=fr.moments.safetensors --moments de=de.moments.safetensors
  qpmerge merge base tuned/sentiment tuned/topics --out merged --heads own
  qpmerge merge --config recipe.yml --out merged
  torchrun --nproc-per-node 2 -m qpmerge_lite merge base fr=tuned/fr de=tuned/de --out merged \\
      --calibration fr=fr.jsonl --calibration de=de.txt
"""
MOMENTS = """
Measure what a model's layers read of its own data, so that others can merge it without them.

The model is run once, alone, over its calibration texts. For every layer the file has the sums of
products of what it reads, by fold of the texts, and says which model, tokenizer and texts they are
of, by SHA-256.
"""
MOMENTS_MORE = """
heads:
  Of a model with a head, layers of the head are measured like all others. A merge that keeps heads
  takes those of the backbone; one that merges heads like everything else takes all.

what a file reveals:
  It is not anonymous. It has how often each token occurs, wherever the table of tokens is solved,
  and otherwise the layers behind it have what such counts can be worked out from; with few texts,
  whole inputs may be. Publish it as you would publish the texts, or word counts of them.

size:
  In float32, two bytes times the square of the width of what a layer reads, for each fold and each
  group of layers that read the same. --folds 1 is smallest, and leaves no ridge to be chosen.

exit status:
  0  the file is there
  1  it was refused, with the reason on the error stream; there is no file then
  2  the command was not understood

example:
  qpmerge moments tuned/fr --calibration fr.jsonl --out fr.moments.safetensors
"""
DELTA = """
Write how an expert differs from its base: a file that is given as delta:FILE to merge, check and
diagnose.

The file has the tensors that are not the base's own, as differences in the base's names. They are
computed in float64 and rounded to --dtype; counters stay whole numbers. Which weights they were
made of stands in its metadata, by SHA-256.
"""
DELTA_MORE = """
what comes back:
  Base and differences give the expert bit for bit, but for the sign of zeros, where no rounding
  was needed. In float32 that is so for weights in bfloat16 and float16 unless one of two numbers
  is thousands of times the other (2^15 and 2^12 times are the most), and for most weights in
  float32, but not for all: of these, numbers that have become much smaller come back with other
  last digits. --dtype float64 keeps them, up to 2^28 times, at twice the size; float16 and bfloat16
  halve it and round every difference. How many numbers do not come back is counted and said.

exit status:
  0  the file is there
  1  it was refused, with the reason on the error stream; there is no file then
  2  the command was not understood

example:
  qpmerge delta base tuned/fr --out fr.safetensors
  qpmerge merge base fr=delta:fr.safetensors de=tuned/de --out merged
"""
COMPLETION = """
Print a script that completes verbs, options, methods, folders and files of this command in a
shell. To complete a word, the shell asks neither Python nor this package.

It is written by shtab: '.[completion]'.
"""
COMPLETION_MORE = """
use:
  bash, now:         source <(qpmerge completion bash)
  bash, always:      qpmerge completion bash > ~/.local/share/bash-completion/completions/qpmerge
  zsh, always:       qpmerge completion zsh > DIR/_qpmerge, for a DIR that is in $fpath

After an update of this package, print it anew.

exit status:
  0  the script was printed
  1  it was not, with the reason on the error stream
  2  the command was not understood
"""
CHECK = """
Say whether checkpoints can be merged, before any weight is read.

Configurations and headers of safetensors files are compared: architecture, names, shapes and
dtypes of tensors, vocabulary, tokenizer, tied, quantised and pickled weights, missing and damaged
files. Every finding has a place, what was expected, what was found, and what to do. Of checkpoints
at the Hub, small files and headers are fetched; what a merge would download is said. Where there
is no error, a table says what each method would take: memory, and what it reads and writes.
"""
CHECK_MORE = """
levels:
  ERROR    no merge is made of these
  WARNING  one is made, but see whether it is what you mean
  INFO     good to know

exit status:
  0  there is no ERROR
  1  there is one
  2  the command was not understood

example:
  qpmerge check base french=tuned/fr german=tuned/de
"""
DIAGNOSE = """
Say what a merge, whoever made it, does to every expert's outputs and to every layer.

MERGED is the folder of the merge, BASE that of the model that all EXPERTs were tuned from. All
three kinds of model read the texts of every expert's task. Where the model has a head or predicts
tokens, predictions are compared, and perplexities where it predicts the next token; otherwise what
the model puts out. Nothing needs labels.
"""
DIAGNOSE_MORE = """
heads:
  Where the merge keeps its experts' heads, or all are backbones of experts with heads, every
  expert's head is put on the backbones of merge, expert and base, and what it predicts is compared,
  besides the outputs that it reads. Heads that predict no classes leave the outputs.

numbers:
  Every number comes with its meaning. Texts that the merge was made on flatter it: give others.
  A certificate says of a layer how far the merge is from the best that these texts allow.

files:
  Nothing is written but the report: one page of HTML that loads nothing and runs nothing; one
  that is there is replaced. Otherwise as with qpmerge merge.

exit status:
  0  the diagnosis is there, whatever it says
  1  it was refused, with the reason on the error stream; no report is written then
  2  the command was not understood

example:
  qpmerge diagnose merged base fr=tuned/fr de=tuned/de \\
      --calibration fr=fr.jsonl --calibration de=de.txt --report merged.html
"""
EVALUATE = """
Say how well models do on data: merges with the heads that they keep, experts, and the base.

MODEL is the folder of a merge, or of any model. --data names a task and its inputs. A merge that
keeps heads gets the head of that name. Classifiers of texts or pictures are measured by accuracy
on labelled inputs; models that predict the next token, by perplexity on texts without labels, and
with --expert by how often they choose the expert's next token.

A model may also be an adapter of peft or delta:FILE, as a change of --base; and each may be at the
Hub, as hf:owner/name: headers, heads and labels are looked at before weights are downloaded.
"""
EVALUATE_MORE = """
data:
  SOURCE is what --calibration of qpmerge merge takes; all of it is read unless --samples is given.
  Labels are numbers of classes, or their names in config.json, in the field "label" or the one that
  --label names. Pictures in a folder have the names of the folders inside it as labels.
  Models with an encoder and a decoder read a text and its target: the perplexity is the target's.

numbers:
  Accuracy has Wilson's 95 % interval; perplexity one of a bootstrap over texts. With --expert, the
  ratio to the expert's and the difference from it have intervals of a bootstrap over inputs, which
  stay paired. Inputs that the merge was made on flatter it: give others.

files:
  Nothing is written. Otherwise as with qpmerge merge. One model is in memory at a time.

exit status:
  0  the numbers are there, whatever they say
  1  it was refused, with the reason on the error stream
  2  the command was not understood

examples:
  qpmerge evaluate merged --data topics=topics-test.jsonl --label topics=topic \\
      --expert topics=tuned/topics --base base
  qpmerge evaluate soup=a ties=b --data fr=fr-test.txt --expert fr=tuned/fr
"""
