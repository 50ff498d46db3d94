"""Proofs for a proof assistant: each as a certificate that the kernel of Coq (Rocq) accepts.  (theory 6, level 5)"""
