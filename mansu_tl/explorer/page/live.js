// Answers to what the page wants to know: those that are in it, and those of a model behind it.
function connection(live, answers) {
  const kept = new Map(Object.entries(answers));
  const waiting = new Map();
  let number = 0;
  const told = [];
  const senders = {
    http: async (request) => {
      const response = await fetch("answer", {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Explorer-Token": live.token },
        body: JSON.stringify(request),
      });
      if (!response.ok) throw new Error(`the explorer's server answers ${response.status}`);
      return response.json();
    },
    frame: (request) => new Promise((resolve) => {
      waiting.set(++number, resolve);
      window.parent.postMessage({ number, request }, "*");
    }),
  };
  if (live.kind === "frame") {
    window.addEventListener("message", (event) => {
      if (event.source !== window.parent || !event.data) return;
      if (event.data.choose) told.forEach((listener) => listener(event.data.choose));
      const resolve = waiting.get(event.data.number);
      if (resolve) { waiting.delete(event.data.number); resolve(event.data.answer); }
    });
  }
  const send = senders[live.kind];

  // The answer to a request, kept but for those that are asked anew each time; an error is one line.
  async function get(request, keep = true) {
    const key = JSON.stringify(request);
    if (!kept.has(key)) {
      if (!send) throw Object.assign(new Error("not in this file"), { absent: true });
      const asked = send(request).then(
        (answer) => answer,
        (problem) => ({ error: `no answer: ${problem.message}. Is mansu-tl explore still running?`, lost: true }),
      );
      kept.set(key, asked);
      const answer = await asked;
      if (!keep || answer.error) kept.delete(key);
      if (answer.error) throw new Error(answer.error);
      return answer;
    }
    const answer = await kept.get(key);
    if (answer.error) throw new Error(answer.error);
    return answer;
  }
  return {
    get,
    alive: Boolean(send),
    has: (request) => kept.has(JSON.stringify(request)),
    tell: (message) => { if (live.kind === "frame") window.parent.postMessage(message, "*"); },
    listen: (listener) => told.push(listener),
  };
}
