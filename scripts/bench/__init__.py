"""Benchmarks: what things cost, counted, or measured side by side in one process.

    python -m scripts.bench cost     operations and kept activations of every method: counted
    python -m scripts.bench step     forward and backward of every method; inference, memory
    python -m scripts.bench paths    cheaper forward passes beside those through W'
    python -m scripts.bench merge    a merged model's forward pass beside the bare backbone's
    python -m scripts.bench pack     runs an hour, 1 to 64 at once over one backbone
    python -m scripts.bench run      a whole VTAB-shaped run beside the loop of released code
    python -m scripts.bench loader   input beside decoding; a streamed test set's memory
    python -m scripts.bench listing  plan and status of a sweep over 10,000 records
    python -m scripts.bench readme   the table of these figures in README.md

Options are key=value: device=cuda, and what `python -m scripts.bench NAME help` lists. Writes
results/bench/NAME.json (NAME-cuda.json on a GPU) with the name of the hardware. Without a GPU the
defaults take minutes on two cores, on fewer blocks and smaller batches, which the file states.
"""
