// A visit to the page in headless Chromium: node visit.mjs URL SCRATCH CHROMIUM [SCREENSHOTS]; what was seen, as JSON.
import { createRequire } from 'node:module';
import { mkdtempSync } from 'node:fs';
import { join } from 'node:path';

const [url, scratch, executablePath, screenshots] = process.argv.slice(2);
const { chromium } = createRequire(join(scratch, 'package.json'))('playwright-core');
const args = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const profile = () => mkdtempSync(join(scratch, 'profile-'));
const seen = { errors: [], elsewhere: [], steps: {} };

async function open(options) {
  const context = await chromium.launchPersistentContext(profile(), { executablePath, args, ...options });
  const page = context.pages()[0] ?? await context.newPage();
  page.on('console', (message) => { if (['error', 'warning'].includes(message.type())) seen.errors.push(message.text()); });
  page.on('pageerror', (error) => seen.errors.push(String(error)));
  page.on('request', (request) => { if (!request.url().startsWith(url) && !request.url().startsWith('data:')) seen.elsewhere.push(request.url()); });
  await page.goto(url);
  await page.waitForSelector('#ranked li');
  return [context, page];
}

const look = (page) => page.evaluate(() => {
  const texts = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
  return {
    kv: document.getElementById('kv').textContent,
    why: document.getElementById('why').textContent,
    history: texts('#history li b'),
    retrieved: texts('#retrieved li b'),
    ranked: texts('#ranked li b'),
    scores: texts('#ranked li .value').map(Number),
    similarities: texts('#retrieved li .value').map(Number),
    chances: texts('#ranked li:first-child .chance'),
    stages: texts('#times > span'),
    pills: texts('.pill'),
    users: texts('#users option'),
    links: document.querySelectorAll('#links path').length,
    problem: document.getElementById('problem').textContent,
    out: Array.from(document.querySelectorAll('#ranked a'), (link) => link.href),
    facts: Array.from(document.querySelectorAll('#ranked small'), (node) => node.textContent),
    foreign: document.querySelectorAll('img, iframe, main script, b *').length + Number('pwned' in window),
    wider: document.documentElement.scrollWidth - innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
  };
});

async function step(page, name, act) {
  const asked = await page.evaluate(() => state.past.length);
  await act();
  await page.waitForFunction((count) => state.past.length > count && !document.body.classList.contains('busy'), asked);
  seen.steps[name] = await look(page);
}

const [context, page] = await open({ viewport: { width: 1360, height: 900 }, colorScheme: 'light' });
seen.steps.start = await look(page);
await step(page, 'click', () => page.click('#ranked li:nth-child(2) button'));
await step(page, 'again', () => page.click('#again'));
if (screenshots) await page.screenshot({ path: join(screenshots, 'page.png') });
await step(page, 'undo', () => page.click('#undo'));
await page.click('#records .chip:nth-child(1)');
await step(page, 'keyboard', async () => { await page.focus('#retrieved li:nth-child(1) button'); await page.keyboard.press('Enter'); });
seen.tags = await page.evaluate(() => [...document.querySelectorAll('#history li:first-child .tag')].map((tag) => tag.textContent));
await step(page, 'weights', () => page.click('#counts .chip:nth-child(1)'));
await step(page, 'reset', () => page.click('#reset'));
await step(page, 'other', () => page.selectOption('#users', { index: 1 }));
await page.route('**/v1/recommend', (route) => route.fulfill({ status: 429, contentType: 'application/json', body: '{"error": {"code": "overloaded", "message": "<b>busy</b>"}}' }));
await page.click('#again');
await page.waitForFunction(() => document.getElementById('problem').textContent);
seen.steps.refused = await look(page);
await context.close();

const [phone, small] = await open({ viewport: { width: 360, height: 740 }, colorScheme: 'dark', hasTouch: true, isMobile: true });
await step(small, 'phone', () => small.tap('#ranked li:nth-child(1) button'));
if (screenshots) await small.screenshot({ path: join(screenshots, 'phone.png') });
seen.visible = [];
for (const tab of ['History', 'Retrieved', 'Re-ranked']) {
  await small.tap(`#tabs button:has-text("${tab}")`);
  seen.visible.push(await small.evaluate(() => [...document.querySelectorAll('.column')].filter((node) => node.offsetHeight).map((node) => node.querySelector('h2').textContent)));
}
await phone.close();
process.stdout.write(JSON.stringify(seen));
