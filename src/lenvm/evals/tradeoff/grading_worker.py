"""The grading process: one JSON task per line on stdin, one JSON result per line on stdout.

Run as `python -m lenvm.evals.tradeoff.grading_worker` by `grading_pool`; an answer whose grading
hangs or eats the memory takes only this process with it.
"""

import json
import resource
import sys

from lenvm.evals.tradeoff.grader import grade_answer

MEMORY_BYTES = 4 << 30


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    results, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    for line in sys.stdin:
        task = json.loads(line)
        try:
            correct, extracted = grade_answer(
                task["text"],
                task["gold"],
                task["kind"],
                options=task["options"],
                complete=task["complete"],
            )
            error = None
        except Exception as caught:  # sympy raises what it likes; the answer is then not right
            correct, extracted, error = False, None, f"{type(caught).__name__}: {caught}"[:300]
        reply = {"correct": correct, "extracted": extracted, "grader_error": error}
        results.write(json.dumps(reply) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
