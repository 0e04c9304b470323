"""A model server of the standard library whose answers follow from the request alone, with planted faults.

`ScriptedServer(respond)` is a context manager; `respond(request)` returns the text of the answer, or a `Reply`. `write`
is a model without faults: it writes questions, answers, follow-ups, paraphrases and judgements in plain sentences.
"""

import hashlib
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

NOUNS = (
    "river bakery engine garden library bridge camera harbour forest kitchen village museum battery pencil mountain "
    "orchard theatre railway lantern compass island meadow factory market tunnel window carpet balcony violin saddle "
    "ladder blanket hammer pillow anchor basket candle donkey feather glacier helmet insect jacket kettle lemon magnet"
).split()
VERBS = (
    "carries builds repairs measures collects paints follows protects changes explains cools warms lifts sorts stores "
    "cleans connects divides guides records shapes supports tests turns watches"
).split()
ADJECTIVES = (
    "quiet bright narrow ancient wooden careful distant gentle heavy modern patient rapid simple steady useful warm "
    "broken curious empty famous golden humid icy jolly keen light"
).split()
CHINESE = (
    "河流 面包 发动机 花园 图书馆 大桥 相机 港口 森林 厨房 村庄 博物馆 电池 "
    "铅笔 高山 果园 剧院 铁路 灯笼 指南针 海岛 草地 工厂 市场 隧道 窗户"
).split()
CHINESE_VERBS = "带来 建造 修理 测量 收集 描绘 跟随 保护 改变 解释 冷却 加热 抬起 整理 存放 清洁 连接 划分".split()


FRAMES = (
    "The {a} {n} {v} the {b} {m} in the morning.",
    "Every {a} {m} near our {n} {v} something {b}.",
    "When a {n} {v} one {m}, it becomes {a} and {b}.",
    "Nobody {v} this {a} {n} without some {b} {m}.",
    "My {b} {m} often {v} that {a} {n} over there.",
    "Because of its {n}, an {a} {m} {v} {b} things.",
    "{A} and {b}: so the {n} {v} her {m}.",
    "Later, two {n}s met where the {m} {v} what was {a}.",
)


class Reply(NamedTuple):
    """An answer that is not simply a text."""

    text: str = ""
    finish: str = "stop"
    status: int = 200
    wait: float = 0.0
    raw: bytes | None = None  # the whole body


class ScriptedServer:
    """The server; `requests` are those that it got, `answered` those that it answered with 200."""

    def __init__(self, respond):
        self.respond, self.requests, self.answered = respond, [], 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(request)
                reply = outer.respond(request)
                reply = reply if isinstance(reply, Reply) else Reply(reply)
                time.sleep(reply.wait)
                message = {"role": "assistant", "content": reply.text}
                choice = {"index": 0, "message": message, "finish_reason": reply.finish}
                prompt = json.dumps(request["messages"])
                usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": max(len(reply.text) // 4, 1)}
                usage["total_tokens"] = sum(usage.values())
                content = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"]}
                content |= {"choices": [choice], "usage": usage}
                if reply.status != 200:
                    content = {"error": {"message": "planted", "type": "planted"}}
                body = json.dumps(content).encode() if reply.raw is None else reply.raw
                try:
                    self.send_response(reply.status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:  # the client has gone
                    return
                with outer._lock:
                    outer.answered += reply.status == 200

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def make_chance(request):
    """Return random numbers that depend on the request alone."""
    text = json.dumps([request["messages"], request.get("seed")], ensure_ascii=False, sort_keys=True)
    return random.Random(hashlib.sha256(text.encode()).digest())


def write_sentences(chance, number, *, chinese=False):
    """Return plain sentences."""
    if chinese:
        parts = [
            f"{chance.choice(CHINESE)}会{chance.choice(CHINESE_VERBS)}{chance.choice(CHINESE)}，"
            f"因为{chance.choice(CHINESE)}需要{chance.choice(CHINESE_VERBS)}"
            for _ in range(number)
        ]
        return "。".join(parts) + "。"
    sentences = []
    for _ in range(number):
        words = {"a": chance.choice(ADJECTIVES), "b": chance.choice(ADJECTIVES), "v": chance.choice(VERBS)}
        words |= {"n": chance.choice(NOUNS), "m": chance.choice(NOUNS), "A": chance.choice(ADJECTIVES).capitalize()}
        sentences.append(chance.choice(FRAMES).format(**words))
    return " ".join(sentences)


def name_step(request):
    """Return what a request asks for: question, answer, follow_up, solution, judge, or the name of an augmentation."""
    text = request["messages"][-1]["content"]
    first = request["messages"][0]
    if "response_format" in request:
        return "judge"
    if first["role"] == "system":
        return "solution" if "####" in first["content"] else "answer"
    marks = {
        "in other words": "paraphrase",
        "easier version": "easier",
        "harder version": "harder",
        "same answer in another form": "format",
        "concrete situation": "context",
        "next message": "follow_up",
        "换一种说法": "paraphrase",
        "简单版本": "easier",
        "困难版本": "harder",
        "另一种形式": "format",
        "具体的情境": "context",
        "下一条消息": "follow_up",
    }
    return next((name for mark, name in marks.items() if mark in text), "question")


def write(request):
    """Answer as a model without faults."""
    chance, step = make_chance(request), name_step(request)
    text = request["messages"][-1]["content"]
    chinese = bool(re.search(r"[\u4e00-\u9fff]", text))
    if step == "judge":
        return json.dumps(
            dict.fromkeys(("relevance", "correctness", "completeness", "safety"), 3 + chance.randrange(3))
        )
    if step == "solution":
        return f"{write_sentences(chance, 3, chinese=chinese)}\n#### {chance.randrange(100)}"
    if step in ("question", "follow_up"):
        return f"{write_sentences(chance, 3, chinese=chinese)} {'为什么？' if chinese else 'Why?'}"
    if step == "paraphrase":
        parent = text.split("\n\n")[1]
        return f"{'请问：' if chinese else 'Tell me about this, please:'} {parent}"
    if step == "format":
        parent = re.search(r"(?:Answer:|回答：)\n(.*?)\n\n(?:Write the same|请按请求)", text, re.DOTALL)[1]
        return "\n".join(f"- {line}" for line in re.split(r"(?<=[.。]) ?", parent) if line)
    if step in ("easier", "harder", "context"):
        return f"{write_sentences(chance, 2, chinese=chinese)} {'为什么？' if chinese else 'How does it work?'}"
    return write_sentences(chance, 4, chinese=chinese)
