"""The equations on plain arrays: norm scales, least norms, joint scales, certificates.  (theory 4 and 5)"""
