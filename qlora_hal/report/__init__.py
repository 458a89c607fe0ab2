"""What a run leaves to be read: metrics.jsonl, run.json, report.html, loss.svg, and the lines in the terminal."""
