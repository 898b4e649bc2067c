from types import SimpleNamespace

pools = SimpleNamespace(req_to_token=None, kv=None)


def get_req_to_token_pool():
    return pools.req_to_token


def get_token_to_kv_pool():
    return pools.kv
