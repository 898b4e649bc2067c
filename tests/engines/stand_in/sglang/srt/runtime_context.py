from types import SimpleNamespace

args = SimpleNamespace(model_path=None)


def get_server_args():
    return args
