"""The same graphs in less precision, and how much that changes the recommendations.

check.py  writes and measures further precisions, and rejects those that stray
fp8.py    linear layers in E4M3, calibrated
masks.py  padding said by a mask, which every engine for GPUs reads
typed.py  graphs in bf16 and fp16, and their emulation
"""
