"""Shares of training tokens by source, for mixtures (data_pipeline/mixtures.py) and, as rates, for training."""

# CT-LLM's 1,254.68 B tokens in per cent, as its project page breaks them down. English and code were not released.
CT_LLM_TOKEN_SHARES = {
    "zh_cc": 56.75,
    "zh_books": 4.77,
    "zh_papers": 2.82,
    "zh_others": 2.45,
    "zh_baike": 0.20,
    "en": 25.10,
    "code": 7.91,
}
