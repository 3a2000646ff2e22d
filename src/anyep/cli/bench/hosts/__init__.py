"""``anyep bench --hosts``: the same exchange between hosts that network namespaces play, over links of known speed."""
