"""Mixtures: shares of training tokens by source, for SeqIO (data_pipeline/mixtures.py) and, as rates, for training; and
ratios of conversations by language, for stores of them (configs/tokenize.py)."""

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

# The SFT mixtures that CT-LLM tried (model card of CT-LLM-SFT): 105,000 Chinese pairs with as many English ones, or a
# half, a quarter, an eighth; each language alone.
CT_LLM_SFT_RATIOS = {
    "1:1": {"zh": 1.0, "en": 1.0},
    "2:1": {"zh": 2.0, "en": 1.0},
    "4:1": {"zh": 4.0, "en": 1.0},
    "8:1": {"zh": 8.0, "en": 1.0},
    "zh": {"zh": 1.0, "en": 0.0},
    "en": {"zh": 0.0, "en": 1.0},
}
