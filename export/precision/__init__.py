"""The same graphs in less precision, and how much that changes the recommendations.

check.py  writes and measures further precisions, and rejects those that stray
fp8.py    linear layers in E4M3, calibrated
typed.py  graphs in bf16 and fp16, and their emulation
"""
