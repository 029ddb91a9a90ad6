"""The stages of a run: each reads files, writes files and returns a summary of JSON values for the closing table.

    sample   policy + DSAT records            -> completions.jsonl
    pair     DSAT records + completions       -> pairs.train.jsonl, pairs.test.jsonl, drops.json, verdicts.jsonl
    train    policy + pairs                   -> ref_logps.npz, checkpoints/, metrics.jsonl, eval.json
    export   checkpoint                       -> hf/
    answer   policy + prompts of a benchmark  -> completions.jsonl (`drift evaluate`)

A stage that was interrupted goes on where it stopped: completions from their journal, training from the last
checkpoint.
"""
