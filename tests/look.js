() => {  // complaints about width, size and contrast of a page, and buttons that touch
    const complaints = [], wide = innerWidth > 1000;
    const say = (what, node) => complaints.push(what + ": " + node.textContent.trim().slice(0, 40));
    if (document.documentElement.scrollWidth > innerWidth) complaints.push("wider than the window");

    if (wide) for (const box of document.querySelectorAll(".md-typeset__scrollwrap"))
        if (box.scrollWidth > box.clientWidth) say("table scrolls", box);
    for (const formula of document.querySelectorAll(".formulas"))
        if (wide && formula.scrollWidth > formula.clientWidth + 1) say("formula scrolls", formula);
    for (const formula of document.querySelectorAll(":is(p, li) > math"))
        if (formula.getBoundingClientRect().right > innerWidth) say("formula is cut", formula);

    const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const remember = (make, known = new Map()) => key => {
        if (!known.has(key)) known.set(key, make(key));
        return known.get(key);
    };
    const read = remember(colour => {
        pixel.clearRect(0, 0, 1, 1);
        pixel.fillStyle = colour;
        pixel.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    });
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
    const ground = remember(node => {
        if (!node) return [255, 255, 255];
        const own = read(getComputedStyle(node).backgroundColor);
        return own[3] > 0.99 ? own : over(own, ground(node.parentElement));
    });
    const light = colour => {
        const [r, g, b] = colour.map(v => v / 255).map(
            v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const seen = new Set();
    while (words.nextNode()) {
        const node = words.currentNode.parentElement;
        if (seen.has(node) || !words.currentNode.data.trim()) continue;
        seen.add(node);
        const box = node.getBoundingClientRect(), style = getComputedStyle(node);
        const opacity = parseFloat(style.opacity);
        if (!box.width || !opacity || style.visibility == "hidden" || node.closest(
            "script, style, noscript, [hidden], .md-search, .headerlink, annotation")) continue;
        const svg = node.closest("svg"), matrix = svg && node.getScreenCTM();
        const scale = svg ? Math.hypot(matrix.a, matrix.b) : 1;
        const size = parseFloat(style.fontSize) * scale;
        if (size < (node.closest("math, tspan") ? 6 : 9)) say(size.toFixed(1) + " px", node);
        const below = ground(svg ? svg.parentElement : node);
        const ink = read(svg ? style.fill : style.color);
        const [a, b] = [light(over([...ink.slice(0, 3), ink[3] * opacity], below)), light(below)];
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) say("contrast " + contrast.toFixed(2), node);
        if (node.closest(".md-content") && !node.closest("table, pre, svg, math, .headerlink")
            && !wide) {
            const range = document.createRange();
            range.selectNodeContents(words.currentNode);
            const text = range.getBoundingClientRect();
            if (text.left < 8 || text.right > innerWidth - 8) say("at the edge", node);
        }
    }
    const buttons = [...document.querySelectorAll(".md-button")].map(
        node => [node, node.getBoundingClientRect()]);
    for (const [k, [node, one]] of buttons.entries()) for (const [, two] of buttons.slice(k + 1))
        if (one.left < two.right + 4 && two.left < one.right + 4
            && one.top < two.bottom + 4 && two.top < one.bottom + 4) say("buttons touch", node);
    return complaints;
}
