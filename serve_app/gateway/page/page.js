"use strict";
const texts = {
  en: { title: "Text to video", prompt: "Describe the video", width: "Width", height: "Height", frames: "Frames",
        steps: "Steps", seed: "Seed", go: "Make video", cancel: "Cancel", recent: "Recent videos", random: "random",
        queued: "Waiting", in_progress: "Running", completed: "Done", failed: "Failed", cancelled: "Cancelled",
        paused: "Paused by the operator", encode: "reading the prompt",
        denoise: "denoising", decode: "decoding the video", finish: "finishing the video",
        place: "place in queue", del: "Delete", more: "Show more",
        key: "This server needs an API key. This tab keeps it until you close the tab.", use: "Use this key",
        forget: "Forget the key", download: "Download", again: "Use these settings", progress: "Progress",
        video: "The video", away: "The server does not answer. Trying again …", broken: "The video cannot be loaded.",
        sure: "Delete this video for good?", example: "a red circle moves right on a white background",
        note: "This is a small test model. It draws one or two moving circles, squares, triangles or stars, and nothing else.",
        left: (s) => s < 90 ? `about ${s} s left` : `about ${Math.round(s / 60)} min left` },
  zh: { title: "文字生成视频", prompt: "描述视频内容", width: "宽度", height: "高度", frames: "帧数",
        steps: "步数", seed: "种子", go: "生成视频", cancel: "取消", recent: "最近的视频", random: "随机",
        queued: "排队中", in_progress: "进行中", completed: "完成", failed: "失败", cancelled: "已取消",
        paused: "管理员已暂停", encode: "理解提示词",
        denoise: "去噪", decode: "解码视频", finish: "后期处理", place: "排队位置", del: "删除", more: "显示更多",
        key: "此服务器需要 API 密钥。密钥仅保存在本标签页中，关闭后即清除。", use: "使用此密钥",
        forget: "清除密钥", download: "下载", again: "使用这些设置", progress: "进度",
        video: "视频", away: "服务器没有响应，正在重试……", broken: "无法加载视频。",
        sure: "确定要永久删除这个视频吗？", example: "一个红色的圆形在白色背景上向右移动",
        note: "这是一个小型测试模型，只能画一到两个运动的圆形、正方形、三角形或星形，不能画其他内容。",
        left: (s) => s < 90 ? `约剩 ${s} 秒` : `约剩 ${Math.round(s / 60)} 分钟` },
};
const language = navigator.language.startsWith("zh") ? "zh" : "en";
const t = texts[language];
const $ = (id) => document.getElementById(id);
const seconds = (video) => `${Math.round(video.seconds * 10) / 10} s`;
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
const FIELDS = ["width", "height", "num_frames", "num_inference_steps", "seed"];
const PAGE = 12;
document.documentElement.lang = language;
document.title = t.title;
for (const node of document.querySelectorAll("[data-t]")) node.textContent = t[node.dataset.t];
for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = t[node.dataset.label];
$("prompt").placeholder = t.example;
$("seed").placeholder = t.random;

// Calls of the API. Status 0 means that the server did not answer.
class Refusal extends Error {
  constructor(status, message, param, wait) { super(message); Object.assign(this, { status, param, wait }); }
  get passing() { return this.status === 0 || this.status === 429 || this.status >= 500; }
}
async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { ...options.headers, authorization: `Bearer ${key}` } : options.headers;
  const answer = await fetch(path, { ...options, headers }).catch(() => null);
  const said = answer && !answer.ok ? (await answer.json().catch(() => ({}))).error : null;
  const away = !answer || (answer.status >= 500 && !said);  // a proxy answered for a server that is gone
  $("away").textContent = away ? t.away : "";
  if (away) throw new Refusal(0, t.away);
  if (answer.ok) return answer;
  const message = said ? said.message : `${answer.status} ${answer.statusText}`;
  if (answer.status === 401 && sessionStorage.getItem("key") === key) wantKey(key ? message : "");
  throw new Refusal(answer.status, message, said && said.param, Number(answer.headers.get("retry-after")) * 1000);
}
const parse = (answer) => answer.json().catch(() => { throw new Refusal(0, t.away); });
const call = async (path, options = {}) => parse(await ask(path, { signal: AbortSignal.timeout(30000), ...options }));
const url = (id, variant) => `v1/videos/${id}/content` + (variant ? `?variant=${variant}` : "");

// Images and players cannot send a key, so with a key their bytes are fetched here.
async function source(address) {
  if (!sessionStorage.getItem("key")) return address;
  return URL.createObjectURL(await (await ask(address)).blob());
}
const release = (address) => address && address.startsWith("blob:") && URL.revokeObjectURL(address);
function complain(error) {
  $("error").textContent = error.status === 401 ? "" : error.message;
  if (error.message) $("error").scrollIntoView({ block: "nearest" });
  for (const name of ["prompt", ...FIELDS]) $(name).ariaInvalid = null;
  if (error.param === "prompt" || FIELDS.includes(error.param)) {
    $(error.param).ariaInvalid = "true";
    $(error.param).focus();
  }
}
const quiet = () => complain({ message: "" });

// The address names the video that is shown, so that it survives a reload and can be linked to.
let turn = 0;  // number of the loop that may show something; earlier loops end
let shown = null;
const named = () => (location.hash.match(/^#(video_\w+)$/) || [])[1];
async function follow() {
  const id = named(), mine = ++turn;
  mark();
  if (!id) { close(); return; }
  if (shown && shown.id !== id) close();
  for (;;) {
    let wait = 1000;
    try {
      const answer = await ask(`v1/videos/${id}`, { signal: AbortSignal.timeout(30000) });
      const video = await parse(answer);
      if (mine !== turn) return;
      const opened = !shown;
      show(video);
      if (opened) $("current").scrollIntoView({ block: "nearest" });
      if (ended(video)) { recent(); return; }
      wait = Math.max(Number(answer.headers.get("openai-poll-after-ms")), 250);
    } catch (error) {
      if (mine !== turn) return;
      if (!error.passing) { close(); complain(error); return; }
      wait = error.wait || wait;
    }
    await sleep(wait);
    if (mine !== turn) return;
  }
}
// The status for people: the API calls a cancelled video failed.
const state = (video) => t[video.status === "failed" && video.error && video.error.code === "cancelled" ? "cancelled"
  : video.paused ? "paused" : video.status];
const ended = (video) => video.status === "completed" || video.status === "failed";
function close() {
  shown = null;
  $("current").hidden = true;
  document.title = t.title;
  unload();
}
function unload() {
  const player = $("player");
  player.hidden = true;
  if (!player.dataset.id) return;
  delete player.dataset.id;
  for (const name of ["src", "poster"]) { release(player.getAttribute(name)); player.removeAttribute(name); }
  $("download").removeAttribute("href");
  player.load();
}
function show(video) {
  shown = video;
  $("current").hidden = false;
  $("bar").value = video.progress;
  $("bar").hidden = $("cancel").hidden = ended(video);
  // Screen readers read this element aloud, so it changes with the status only, not with every step.
  if ($("state").textContent !== state(video)) $("state").textContent = state(video);
  const parts = [];
  if (video.queue_position) parts.push(`${t.place} ${video.queue_position}`);
  if (video.status === "in_progress" && video.stage) {
    parts.push(`${t[video.stage] || video.stage} ${video.step}/${video.steps}`);
  }
  if (video.seconds_left != null && !ended(video)) parts.push(t.left(Math.ceil(video.seconds_left)));
  if (video.error) parts.push(video.error.message);
  $("detail").textContent = parts.join(", ");
  document.title = ended(video) || video.paused ? `${state(video)} · ${t.title}` : `${video.progress} % · ${t.title}`;
  $("facts").textContent = [video.prompt, video.size, seconds(video), `${t.steps} ${video.num_inference_steps}`,
    `${t.seed} ${video.seed}`].join(" · ");
  const warnings = video.warnings.join("\n");
  if ($("warnings").textContent !== warnings) $("warnings").textContent = warnings;
  $("warnings").hidden = !warnings;
  $("download").hidden = video.status !== "completed";
  if (video.status === "completed") play(video.id); else unload();
}
async function play(id) {
  const player = $("player");
  if (player.dataset.id === id) return;
  unload();
  player.dataset.id = id;
  player.hidden = false;
  try {
    for (const [name, address] of [["poster", url(id, "thumbnail")], ["src", url(id)]]) {
      const found = await source(address);
      if (player.dataset.id !== id) { release(found); return; }
      player.setAttribute(name, found);
    }
    $("download").href = player.src;
    $("download").download = `${id}.mp4`;
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) player.play().catch(() => {});
  } catch (error) { if (player.dataset.id === id) complain(error); }
}
$("player").onerror = () => { if ($("player").dataset.id) complain({ message: t.broken }); };

// The list of videos. Rows are kept on a refresh, so that neither focus nor pictures are lost.
const rows = new Map();
let length = PAGE, timer = 0;
async function recent() {
  clearTimeout(timer);
  let pause = 3000;
  try {
    const page = await call(`v1/videos?limit=${length}`);
    const ids = new Set(page.data.map((video) => video.id));
    for (const [id, row] of rows) {
      if (!ids.has(id)) { release(row.picture.src); row.node.remove(); rows.delete(id); }
    }
    page.data.forEach((video, index) => {
      if (!rows.has(video.id)) rows.set(video.id, makeRow(video));
      const row = rows.get(video.id);
      row.state.textContent = [state(video), video.size, seconds(video), `${t.seed} ${video.seed}`].join(" · ");
      if (video.status === "completed" && !row.pictured) {
        row.pictured = true;
        source(url(video.id, "thumbnail")).then((found) => { row.picture.src = found; }, () => { row.pictured = false; });
      }
      if ($("list").children[index] !== row.node) $("list").insertBefore(row.node, $("list").children[index] || null);
    });
    mark();
    $("more").hidden = !page.has_more || length >= 100;
    pause = page.data.every(ended) ? 15000 : 2000;
  } catch (error) {
    if (error.status === 401) return;
    if (!error.passing) { complain(error); return; }
    pause = error.wait || pause;
  }
  clearTimeout(timer);
  timer = setTimeout(recent, pause);
}
function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function makeRow(video) {
  const picture = make("img", { alt: "" }), state = make("small", {});
  const prompt = make("div", { className: "prompt", dir: "auto", textContent: video.prompt, title: video.prompt });
  const link = make("a", { href: `#${video.id}` }, picture, make("div", { className: "text" }, prompt, state));
  link.onclick = () => { quiet(); if (shown) $("current").scrollIntoView({ block: "nearest" }); };
  const remove = make("button", { type: "button", className: "plain", textContent: t.del });
  remove.ariaLabel = `${t.del}: ${video.prompt}`;
  remove.onclick = async () => {
    if (!confirm(`${t.sure}\n\n${video.prompt}`)) return;
    remove.disabled = true;
    try {
      await call(`v1/videos/${video.id}`, { method: "DELETE" });
      if (named() === video.id) location.hash = "";
    } catch (error) { if (error.status !== 404) complain(error); }
    remove.disabled = false;
    recent();
  };
  return { node: make("li", {}, link, remove), picture, state, link, pictured: false };
}
function mark() {
  for (const [id, row] of rows) {
    if (id === named()) row.link.setAttribute("aria-current", "true"); else row.link.removeAttribute("aria-current");
  }
}

// The form's values are kept until the tab is closed.
const draft = () => Object.fromEntries(["prompt", ...FIELDS].map((name) => [name, $(name).value]));
const keep = () => sessionStorage.setItem("draft", JSON.stringify(draft()));
function fill(values) {
  for (const name of ["prompt", ...FIELDS]) $(name).value = values[name] ?? "";
  keep();
}
$("form").oninput = keep;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
};
// An idempotency key: a retry after a broken connection creates no second video.
let sent = { text: "", name: "" };
const fresh = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("-");
$("form").onsubmit = async (event) => {
  event.preventDefault();
  quiet();
  const body = { prompt: $("prompt").value };
  for (const name of FIELDS) if ($(name).value !== "") body[name] = Number($(name).value);
  const text = JSON.stringify(body);
  if (sent.text !== text) sent = { text, name: fresh() };
  $("go").disabled = true;
  try {
    const headers = { "content-type": "application/json", "idempotency-key": sent.name };
    const video = await call("v1/videos", { method: "POST", headers, body: text });
    sent = { text: "", name: "" };
    location.hash = video.id;
    recent();
  } catch (error) { complain(error); }
  $("go").disabled = false;
};
$("again").onclick = () => { fill(shown); $("prompt").focus(); };
$("cancel").onclick = async () => {
  $("cancel").disabled = true;
  const id = shown.id;
  try {
    const video = await call(`v1/videos/${id}/cancel`, { method: "POST" });
    if (shown && shown.id === id) show(video);
  } catch (error) { complain(error); }
  $("cancel").disabled = false;
};
$("more").onclick = () => { length = Math.min(length + PAGE, 100); recent(); };

// The API key, if the server needs one. It is kept in the tab's session storage, never in an address.
function wantKey(why) {
  turn++;
  clearTimeout(timer);
  sessionStorage.removeItem("key");
  close();
  for (const [id, row] of rows) { release(row.picture.src); row.node.remove(); rows.delete(id); }
  $("app").hidden = $("forget").hidden = true;
  $("login").hidden = false;
  $("why").textContent = why;
  $("key").focus();
}
$("login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = $("why").textContent = "";
  start();
};
$("forget").onclick = () => wantKey("");

async function start() {
  for (;;) {
    try {
      const { data: [model] } = await call("v1/models");
      $("note").hidden = !model.note;
      for (const name of FIELDS) {
        if (name in model.defaults) $(name).placeholder = model.defaults[name];
        if (model.limits[name]) $(name).max = model.limits[name];
      }
      break;
    } catch (error) {
      if (!error.passing) { complain(error); return; }
      await sleep(error.wait || 2000);
    }
  }
  $("login").hidden = true;
  $("app").hidden = false;
  $("forget").hidden = !sessionStorage.getItem("key");
  recent();
  follow();
}
addEventListener("hashchange", follow);
fill(JSON.parse(sessionStorage.getItem("draft") || "{}"));
start();
