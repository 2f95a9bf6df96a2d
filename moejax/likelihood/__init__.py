"""The likelihood: its EM steps, its derivatives, the climb to its maximum and the information there."""

__all__ = ["blocks", "collapse", "derivatives", "em", "information", "m_step", "polish", "predictors", "scan"]
