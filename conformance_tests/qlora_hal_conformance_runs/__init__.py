"""What `--for` judges of one run beyond the suite: its mixture of experts, and what its settings really come to.

No certificate holds any of it, so it is no part of the suite, whose hash names every source that decides a certificate.
Results name the hash of these sources beside the suite's.
"""
