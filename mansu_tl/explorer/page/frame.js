// In the notebook's page: an iframe with the explorer in it, whose questions go to the kernel and back.
export default {
  render({ model, el }) {
    const frame = document.createElement("iframe");
    frame.title = "Explorer";
    frame.setAttribute("sandbox", "allow-scripts allow-downloads");
    frame.style.cssText = `width: 100%; height: ${model.get("height")}px; border: 0`;
    const told = (message) => {
      if (message && message.page) frame.srcdoc = message.page;
      else if (frame.contentWindow) frame.contentWindow.postMessage(message, "*");
    };
    const asked = (event) => {
      if (event.source !== frame.contentWindow || !event.data) return;
      if (event.data.request || event.data.chosen) model.send(event.data);
    };
    model.on("msg:custom", told);
    window.addEventListener("message", asked);
    el.append(frame);
    model.send({ page: true });
    return () => {
      model.off("msg:custom", told);
      window.removeEventListener("message", asked);
    };
  },
};
