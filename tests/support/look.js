// Look at pages in a real browser: node look.js MODULES CHROMIUM PICTURES URL..., one line of JSON per URL.
// MODULES is a folder with playwright-core and axe-core; PICTURES a folder for screenshots, or empty.
const fs = require("fs");
const path = require("path");
const [modules, executablePath, pictures, ...urls] = process.argv.slice(2);
const { chromium } = require(path.join(modules, "playwright-core"));
const axe = fs.readFileSync(path.join(modules, "axe-core", "axe.min.js"), "utf8");
const args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
args.push("--disable-component-update", "--disable-sync");

async function look(browser, url) {
  const page = await browser.newPage();
  const complaints = [];
  page.on("console", (message) => complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  const answer = await page.goto(url);
  const name = new URL(url).pathname.split("/")[1];
  await page.evaluate(axe);
  const violations = [];
  const overflow = [];
  for (const width of [400, 1600]) {
    for (const colorScheme of ["light", "dark"]) {
      await page.setViewportSize({ width, height: 900 });
      await page.emulateMedia({ colorScheme });
      const scroll = await page.evaluate(() => document.documentElement.scrollWidth);
      if (scroll > width) overflow.push(`${width}: ${scroll}`);
      if (pictures) {
        await page.screenshot({ path: path.join(pictures, `${name}-${width}-${colorScheme}.png`), fullPage: true });
      }
      if ((width === 400) !== (colorScheme === "light")) continue; // colours do not depend on the width
      const rules = { resultTypes: ["violations", "incomplete"] };
      if (width !== 400) rules.runOnly = ["color-contrast"];
      // Of workspaces and models that look alike, the first few stand for all.
      const alike = [".card:nth-child(n+6)", ".models table:nth-child(n+3)", ".models tr:nth-child(n+5)"];
      const found = await page.evaluate(([context, options]) => axe.run(context, options), [{ exclude: alike }, rules]);
      for (const one of [...found.violations, ...found.incomplete]) {
        violations.push(`${width} ${colorScheme} ${one.id}: ${one.nodes[0].html}`);
      }
    }
  }
  await page.evaluate(() => document.activeElement.blur());
  const reached = [];
  for (let step = 0; step < 8; step++) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => document.activeElement.textContent.trim()));
  }
  const roles = await page.evaluate(() =>
    ["header", "main", "footer", "nav", "h1"].map((tag) => document.querySelectorAll(tag).length));
  const styled = await page.evaluate(() => getComputedStyle(document.querySelector(".tiles")).display === "grid");
  const scripts = await page.evaluate(() => document.querySelectorAll("script, b").length);
  const heading = await page.evaluate(() => document.querySelector("h1").getBoundingClientRect().bottom);
  await page.close();
  const status = answer.status();
  return { name, status, complaints, violations, overflow, reached, roles, styled, scripts, heading };
}

(async () => {
  const browser = await chromium.launch({ executablePath, args });
  for (const url of urls) console.log(JSON.stringify(await look(browser, url)));
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
