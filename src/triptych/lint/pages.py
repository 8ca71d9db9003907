"""What the pages of docs/lint say of every rule, for reports that are read far from them; `python -m tests.lint_cases` writes it."""

from __future__ import annotations

TEXTS = {
    "config-shapes": """\
`config-shapes`, error, reads headers.

Computes from `config.json` and the family's record how many rows each fused or separate projection must have, and compares.

## Why

The config belongs to another size of the model, or the checkpoint was cut for tensor parallelism. Code that reshapes by the config then
fails, or reads heads that are none.

## Remedy

Find out which of the two belongs to the other model. `triptych inspect` shows the sizes that are used, `-s h=12` gives others.""",
    "double-tensor": """\
`double-tensor`, error, reads headers.

Finds a tensor name that two shards of one set have.

## Why

Which of the two is loaded depends on the order in which a program opens files. Merging shards, or adding an adapter to a folder, leaves
such pairs.

## Remedy

`triptych diff` tells whether the two are equal. Keep the one that is meant, and write the index anew.""",
    "incomplete-projection": """\
`incomplete-projection`, error, reads headers.

Finds a projection of which one of q, k and v is not there: by the family's record, and without one by comparison with the other layers.
Layers that share k and v with another layer, or keys that serve as values, are in the records and are no fault.

## Why

A model loads without `v_proj` of one layer: the place is filled with fresh random numbers, and only the quality tells.

## Remedy

Fetch or write the missing tensor.""",
    "missing-index": """\
`missing-index`, error, reads headers.

Finds shards that are numbered (`model-00001-of-00002.safetensors`) and named by no index.

## Why

Without `model.safetensors.index.json` most loaders, Triptych among them, do not know which files belong together.

## Remedy

Write the index: a table `weight_map` (tensor to file) and `metadata.total_size`. `safetensors` headers have all that it needs.""",
    "missing-layer": """\
`missing-layer`, error, reads headers.

Looks at the numbers in `layers.N.`, `h.N.`, `blocks.N.` and their like: a gap, or fewer layers than `config.json` says. Other numbered
modules may have gaps and are not looked at.

## Why

A lost layer leaves a model that loads, with a layer of fresh random numbers in it.

## Remedy

Fetch or write the missing layer. If layers were removed on purpose, renumber them and correct `num_hidden_layers`.""",
    "missing-shard": """\
`missing-shard`, error, reads headers.

Names a file that the index, or the numbers in the names of the other shards, promise and that is not there.

## Why

A folder with one shard less still has an index, a config and gigabytes of weights. Some loaders fill what is missing with fresh random
numbers and go on with a warning.

## Remedy

Fetch the missing file. If the model is whole without it, write the index anew from the headers of the shards that are there.""",
    "missing-tensor": """\
`missing-tensor`, error, reads headers.

Names a tensor that the index places in a file that does not have it. Files that are missing or damaged are other findings.

## Why

The index was not written together with the shards: a renamed tensor, a shard from another save, an export that stopped.

## Remedy

If the tensor lies elsewhere, write the index anew. If it lies nowhere, fetch the shard that has it.""",
    "mixed-dtype": """\
`mixed-dtype`, warning, reads headers.

Finds tensors whose names differ only in numbers and whose dtypes differ, and q, k and v of one layer with different dtypes.

## Why

A half-cast checkpoint loads, and the odd layer is silently cast or slows everything down. Fused projections cannot hold two dtypes.

## Remedy

Cast the odd ones. Where some layers are kept wider on purpose, run lint with `--ignore mixed-dtype`.""",
    "not-finite": """\
`not-finite`, error, reads all numbers; not with `--fast`.

Counts NaN and infinities in every tensor of a float dtype.

## Why

One NaN in a projection makes every output NaN. A cast from bfloat16 or float32 to float16 overflows to infinity beyond 65504.

## Remedy

Go back to a checkpoint before the divergence. After a cast, keep the tensor in bfloat16 or float32.""",
    "pickle-objects": """\
`pickle-objects`, warning, reads headers.

Lists the names that a pickle asks for beyond those that tensors, numbers and texts need.

## Why

Such objects (`argparse.Namespace`, a trainer's state, a whole model) need the code of others to load; `torch.load(weights_only=True)`
refuses the file, and `weights_only=False` runs whatever it asks for.

## Remedy

Save the tensors alone, as safetensors, and settings as JSON.""",
    "split-projection": """\
`split-projection`, warning, reads headers.

Finds separate q, k and v of one layer in different files.

## Why

Nothing is wrong with it, but tools that work file by file (quantisation with one scale for q, k and v; fusing; loading on one rank) then
read one file too many or fail.

## Remedy

Put the three into one file. `triptych convert PATH OUT --to fused` joins them into one tensor, in the file of the first.""",
    "stale-shard": """\
`stale-shard`, warning, reads headers.

Finds a numbered shard, named like those of the index, that the index does not name.

## Why

It is usually left over from an earlier save with more shards. It costs room, and tools that read every file of a folder mix two versions of
a model.

## Remedy

Remove it once you know that nothing in it is wanted.""",
    "stamp": """\
`stamp`, error, reads headers.

Reads the stamp of every file: it must be well-formed, name tensors that are there, and its sizes must give their rows.

## Why

A stamp was written together with the bytes. If it does not fit, the file was changed afterwards: pruned, merged, or fine-tuned with other
sizes.

## Remedy

Convert the original again. If the change was right, write a new stamp or remove the key `triptych` from `__metadata__`.""",
    "stamp-config": """\
`stamp-config`, warning, reads headers.

Compares the layout in the stamp with the one that the family of `config.json` has.

## Why

A converted file says by its stamp how its rows lie, but `config.json` still names a family whose own code reads another order. Loaded with
that code the model runs and is wrong.

## Remedy

Load it with code that reads the stamp, or convert it back: `triptych convert PATH OUT --to LAYOUT` with the family's layout.""",
    "total-size": """\
`total-size`, warning, reads headers.

Compares `metadata.total_size` of the index with the sum of the bytes of all tensors, when all shards are there.

## Why

The number is used to plan memory and to check downloads. A wrong one means that index and shards were not written together, or that tied
tensors were counted twice.

## Remedy

Write the sum that is shown into the index. If the files changed since the index was written, look for missing-tensor
too.""",
    "two-weight-sets": """\
`two-weight-sets`, warning, reads headers.

Finds two sets of weights in one folder that share names of tensors: a single file beside shards, or safetensors beside `pytorch_model.bin`.

## Why

Programs choose by rules of their own, so two programs may load two models from one folder. When only one of the two sets was converted, the
other still has the old layout.

## Remedy

Keep one set. Where both are wanted, keep them in two folders.""",
    "unfinished": """\
`unfinished`, error, reads headers.

Finds what a killed conversion leaves: `.triptych-unfinished.json`, or a file `.NAME.triptych-part`.

## Why

The folder looks like a checkpoint and is not complete. A finished conversion removes both.

## Remedy

Run the same conversion again: it keeps the files that are finished and goes on. Or remove the folder.""",
    "unknown-layout": """\
`unknown-layout`, warning, reads headers.

Names tensors that look fused and whose rows nobody explains: no config, no record of its family, two records that differ, or a record that
is known to be ambiguous because files of the model exist in two orders.

## Why

The same shape has several layouts. A program that guesses reads plausible numbers and gives every head the wrong rows.

## Remedy

Write a stamp into the file, or a family record. `triptych detect` shows what the weights say.""",
    "unlisted-tensor": """\
`unlisted-tensor`, error, reads headers.

Names a tensor that a shard holds and the index does not speak of.

## Why

Loaders go by the index: they do not see this tensor and may fill its place with fresh random numbers.

## Remedy

Write the index anew from the headers of the shards.""",
    "unprintable-name": """\
`unprintable-name`, error, reads headers.

Finds control characters and other characters that cannot be printed in the names of files and tensors.

## Why

A terminal obeys some of them: a name can hide lines of a listing or forge others. Two names that look equal can differ.

## Remedy

Rename the tensor or file, or take the checkpoint from a source that you trust.""",
    "unreadable-file": """\
`unreadable-file`, error, reads headers.

Names a file whose header, index, JSON or tensors cannot be read: cut short, garbled, not of its kind, not a regular file, or refused
because reading it would mean running code. The rest of the checkpoint is still looked at.

## Why

A download that stopped, a disk that filled up and a file that Git LFS left as a pointer all keep the right name. Loaders find out late,
often after minutes, and some stop at the first of several.

## Remedy

Fetch the file again and compare its checksum with the publisher's. If it stays so, the file was written wrong: ask who wrote it.""",
    "unsafe-pickle": """\
`unsafe-pickle`, error, reads headers.

Lists the names that the pickles in `.bin`, `.pt`, `.pth`, `.ckpt` and `.pkl` files ask Python to import, when they are of modules that run
code (`os`, `subprocess`, `builtins.eval`, ...), are computed by the pickle itself, or the pickle is too long to be looked through. Nothing
is imported or run: the names are read off the instructions, to the end of the file.

## Why

Loading such a file runs the code with your rights. That a file is popular says nothing about the copy that you have. No list of such
modules is complete: names on no list are pickle-objects, and a file without either finding needs nothing but tensors.

## Remedy

Do not load the file. Take a safetensors file of the same weights, which can hold no code.""",
    "untrained-part": """\
`untrained-part`, warning, reads all numbers; not with `--fast`.

Measures whether all rows of a part of a projection, or of another matrix, have the same bits (two rows settle it for nearly every tensor).
A matrix that is all zero counts. Vectors do not: a norm weight of ones is honest. No other sign of missing training is looked for.

## Why

No training leaves equal rows. They come from `torch.full`, from an initialisation that was never overwritten, or from a loader that filled
a gap.

## Remedy

Check that these weights were trained, and that they were loaded before they were saved. An adapter's B matrix is zero before its first
step.""",
    "weights-contradict": """\
`weights-contradict`, error, only with `--check-weights`.

With `--check-weights`: asks `detect` about every fused q, k, v weight and reports where it is confident of another layout than record or
stamp say. Where the weights cannot tell, nothing is reported.

## Why

Two vendors' files of one model can have the same names, shapes and config and different orders of rows. Only the values tell them apart.

## Remedy

`triptych detect PATH` shows the evidence. Convert with `--layout`, which says what the rows really are, or correct the stamp or record.""",
    "zero-part": """\
`zero-part`, error, reads all numbers; not with `--fast`.

Measures for each part (q, k, v, gate, up, ...) of every projection weight whose layout is known whether all of its numbers are zero.
Biases, and parts that a layout declares zero, are left out.

## Why

A fused tensor is often made empty and filled part by part. When one part has another name than the program expects, its third stays zero,
and the shape is right.

## Remedy

Look where the tensor was written, and convert again. `triptych inspect` shows which rows are which part.""",
    "zero-rows": """\
`zero-rows`, warning, reads all numbers; not with `--fast`.

Measures whether whole heads of a part are zero; in tensors that look fused and whose layout is not known, whether at least an eighth of the
rows is zero in one run.

## Why

Heads may be padded for tensor parallelism or pruned on purpose. Otherwise a shard was not copied.

## Remedy

Check that it is meant. If so, `--ignore zero-rows`.""",
}
"""Rule -> Markdown."""
