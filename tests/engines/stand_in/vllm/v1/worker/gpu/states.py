"""The V2 runner's requests by slot."""


class RequestState:
    def remove_request(self, req_id: str) -> int | None:
        raise NotImplementedError
