/**
 * The quantities that a text names: numbers in digits, in English words and in Chinese numerals, with unit, currency or
 * scale; dates, months and weekdays, times, fractions, versions.
 *
 * Pure. Reads folded text (NFKC, lower case). One pass of one pattern without nested repetition: linear in the text.
 * It does not convert units: an hour is not 60 minutes here, and a miss is cheap.
 */

/** One quantity; `value` is canonical text ("1000", "3.5", "1.2.3", "10:30"), `unit` is "" where none is written. */
export type Quantity = { readonly value: string; readonly unit: string };

/** The quantities of a folded text, sorted by value and unit. */
export function quantitiesOf(folded: string): Quantity[] {
  const found: Quantity[] = [];
  const words = new NumberWords(found);
  // A number that only counts the question itself is none of its quantities: "3. How do I …".
  const text = folded.replace(/^\(?\d{1,2}[.、:)](?!\d)/, "");
  for (const match of text.matchAll(TOKEN)) {
    const { groups = {} } = match;
    const end = match.index + match[0].length;
    if (groups.word !== undefined) {
      words.read(groups.word, text, end);
      continue;
    }
    words.flush(text);
    const before = text.slice(Math.max(0, match.index - CONTEXT_CHARS), match.index);
    const after = text.slice(end, end + CONTEXT_CHARS);
    if (groups.han !== undefined) pushHan(groups.han, before, after, found);
    else if (groups.date !== undefined) pushDate(groups.date, found);
    else if (groups.number !== undefined) found.push(quantity(groups.number, before, after));
    else if (groups.weekday !== undefined) {
      found.push({ value: HAN_WEEKDAYS[groups.weekday] ?? groups.weekday, unit: WEEKDAY });
    } else found.push({ value: match[0], unit: "" });
  }
  words.flush(text);
  return found.sort(
    (left, right) => compare(left.value, right.value) || compare(left.unit, right.unit),
  );
}

/**
 * What differs between two sorted lists, in words, or undefined. Values must be equal, all of them; units must be where
 * both texts write one ("5 km" is "5", but not "5 miles"). A per cent sign must be on both sides or on neither.
 */
export function quantityDifference(
  question: readonly Quantity[],
  candidate: readonly Quantity[],
): string | undefined {
  const left = onlyIn(question, candidate);
  const right = onlyIn(candidate, question);
  if (left !== undefined && right !== undefined) return `number ${left} ≠ ${right}`;
  if (left !== undefined || right !== undefined) return `number ${left ?? right} in one text only`;
  for (const [index, { value, unit }] of question.entries()) {
    const other = candidate[index]?.unit ?? "";
    const isLoose = (unit === "" && other !== PERCENT) || (other === "" && unit !== PERCENT);
    if (unit !== other && !isLoose) {
      return `number ${named(value, unit)} ≠ ${named(value, other)}`;
    }
  }
  return undefined;
}

function onlyIn(list: readonly Quantity[], other: readonly Quantity[]): string | undefined {
  let at = 0; // Both are sorted by value.
  for (const { value, unit } of list) {
    while (compare(other[at]?.value ?? LAST, value) < 0) at++;
    if (other[at]?.value !== value) return named(value, unit);
    at++;
  }
  return undefined;
}

/** After every value: values begin with a digit, a sign or a letter. */
const LAST = "\uffff";

function named(value: string, unit: string): string {
  const text = unit === "" ? value : `${value} ${unit}`;
  return text.length > SAYS_CHARS_MAX ? `${text.slice(0, SAYS_CHARS_MAX)}…` : text;
}

const SAYS_CHARS_MAX = 40;

function compare(left: string, right: string): number {
  return left < right ? -1 : left > right ? 1 : 0;
}

/** Looked at around a number for its unit, sign or currency. */
const CONTEXT_CHARS = 16;
const PERCENT = "%";
const WEEKDAY = "weekday";
const MONTH = "month";

/**
 * Alternatives in order of length: dates, then what has several parts, then plain numbers. Digits of other scripts are
 * compared as they are written.
 */
const TOKEN = new RegExp(
  [
    String.raw`(?<date>(?<!\d)\d{4}[-/.]\d{1,2}[-/.]\d{1,2}(?!\d))`,
    String.raw`(?<!\d)\d{1,2}[-/]\d{1,2}[-/]\d{2,4}(?!\d)`, // Day or month first: nobody knows.
    String.raw`\d{1,2}:\d{2}(?::\d{2})?`,
    String.raw`\d+\.\d+\.[\d.]*\d`, // A version or an address.
    String.raw`\d+/\d+`,
    String.raw`(?<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?)`,
    `(?:周|星期|礼拜)(?<weekday>[一二三四五六日天])`,
    `(?<han>[零〇一二两三四五六七八九十百千万亿]+(?:点[零〇一二三四五六七八九]+)?)`,
    `(?<word>[a-z]+)`,
    String.raw`\p{Nd}+`,
  ].join("|"),
  "gu",
);

// ---- digits ---------------------------------------------------------------------------------------------------

function pushDate(text: string, found: Quantity[]): void {
  const [year = "", month = "", day = ""] = text.split(/[-/.]/);
  found.push({ value: year, unit: "year" });
  found.push({ value: trimmed(month), unit: MONTH });
  found.push({ value: trimmed(day), unit: "day" });
}

function quantity(digits: string, before: string, after: string): Quantity {
  const scale = scaleOf(after);
  let unit = unitAfter(after.slice(scale.chars), scale.chars === 0);
  if (unit === "") unit = unitBefore(before);
  let value = digits.replaceAll(",", "");
  if (scale.factor !== 1) value = scaled(value, scale.factor);
  // 3.10 is a version that is not 3.1, but $3.10 is $3.1; 07 may be a code, but 07月 is July.
  if (unit !== "") value = trimmed(value);
  const isNegative = /(?:^|[(=,:]|[^\d\s] )-$/.test(before);
  return { value: isNegative ? `-${value}` : value, unit };
}

/** Without leading zeros and without trailing ones of the fraction. */
function trimmed(value: string): string {
  const whole = value.replace(/^0+(?=\d)/, "");
  return whole.includes(".") ? whole.replace(/\.?0+$/, "") : whole;
}

/** More digits than a double holds stay text: two long numbers must not become equal by rounding. */
const SCALED_DIGITS_MAX = 12;

function scaled(value: string, factor: number): string {
  if (value.length > SCALED_DIGITS_MAX) return `${value}×${factor}`;
  return String(Math.round(Number(value) * factor * 1000) / 1000);
}

const SCALES: ReadonlyMap<string, number> = new Map(
  Object.entries({
    k: 1e3,
    w: 1e4,
    thousand: 1e3,
    lakh: 1e5,
    lakhs: 1e5,
    million: 1e6,
    crore: 1e7,
    crores: 1e7,
    billion: 1e9,
    bn: 1e9,
    trillion: 1e12,
    百: 1e2,
    千: 1e3,
    万: 1e4,
    萬: 1e4,
    亿: 1e8,
  }),
);

function scaleOf(after: string): { factor: number; chars: number } {
  const han = SCALES.get(after.slice(0, 1));
  // 千克, 千米 and 百分 are units and words of their own.
  if (han !== undefined && !/^[a-z千百]/.test(after)) return { factor: han, chars: 1 };
  if (han !== undefined && /^[千百](?![米克瓦分])/.test(after)) return { factor: han, chars: 1 };
  const [whole = "", space = "", word = ""] = /^([ -]?)([a-z]+)/.exec(after) ?? [];
  const factor = SCALES.get(word);
  const isFar = word.length === 1 && space !== "";
  return factor === undefined || isFar ? { factor: 1, chars: 0 } : { factor, chars: whole.length };
}

const CURRENCIES: Readonly<Record<string, string>> = {
  $: "dollar",
  "€": "euro",
  "£": "pound",
  "₹": "rupee",
  "¥": "yuan",
};

const UNITS: ReadonlyMap<string, string> = new Map(
  Object.entries({
    "%": "% percent percents",
    dollar: "$ dollar dollars usd bucks 美元 美金",
    euro: "€ euro euros eur 欧元",
    pound: "£ gbp 英镑",
    rupee: "₹ rupee rupees inr rs 卢比",
    yuan: "¥ yuan rmb cny 元 块 块钱 圆 人民币",
    mile: "mile miles mi 英里",
    km: "km kms kilometer kilometers kilometre kilometres 公里 千米",
    metre: "meter meters metre metres 米",
    cm: "cm centimeter centimeters centimetre centimetres 厘米",
    mm: "mm millimeter millimeters 毫米",
    foot: "foot feet ft",
    inch: "inch inches 英寸 寸",
    kg: "kg kgs kilo kilos kilogram kilograms 公斤 千克",
    gram: "g gram grams 克",
    jin: "斤",
    lb: "lb lbs",
    litre: "l liter liters litre litres 升",
    kb: "kb",
    mb: "mb",
    gb: "gb",
    tb: "tb",
    watt: "watt watts",
    volt: "v volt volts",
    ghz: "ghz",
    mhz: "mhz",
    celsius: "°c celsius 摄氏度",
    fahrenheit: "°f fahrenheit",
    second: "sec secs second seconds 秒 秒钟",
    minute: "min mins minute minutes 分钟",
    hour: "h hr hrs hour hours 小时 个小时 钟头",
    day: "day days 天 日 号",
    week: "week weeks 周 星期 个星期 礼拜",
    // 3月 is March, 3个月 three months: the reader must keep them apart.
    month: "月 月份",
    months: "month months 个月",
    year: "year years yr yrs 年",
    aged: "岁",
    am: "am",
    pm: "pm",
    times: "倍",
  }).flatMap(([unit, names]) => names.split(" ").map((name) => [name, unit] as const)),
);

function unitAfter(after: string, isAdjacent: boolean): string {
  const symbol = /^ ?([%$€£¥₹]|°[cf])/.exec(after)?.[1];
  if (symbol !== undefined) return UNITS.get(symbol) ?? "";
  const [, space = "", word] = /^([ -]?)([a-z]+)/.exec(after) ?? [];
  if (word !== undefined) {
    // A single letter is a unit only where it touches: "5 s" may begin a word of its own, "10k v" too.
    return word.length === 1 && (space !== "" || !isAdjacent) ? "" : (UNITS.get(word) ?? "");
  }
  const near = after.replace(/^ /, "");
  for (const length of [3, 2, 1]) {
    const unit = UNITS.get(near.slice(0, length));
    if (unit !== undefined && /\P{ASCII}/u.test(near[0] ?? "a")) return unit;
  }
  return "";
}

function unitBefore(before: string): string {
  const symbol = /([$€£¥₹]) ?-?$/.exec(before)?.[1];
  if (symbol !== undefined) return CURRENCIES[symbol] ?? "";
  if (/百分之$/.test(before)) return PERCENT;
  return /(?:^|[^a-z])rs\.? ?$/.test(before) ? "rupee" : "";
}

// ---- Chinese numerals -----------------------------------------------------------------------------------------

const HAN_DIGITS: Readonly<Record<string, number>> = {
  零: 0,
  〇: 0,
  一: 1,
  二: 2,
  两: 2,
  三: 3,
  四: 4,
  五: 5,
  六: 6,
  七: 7,
  八: 8,
  九: 9,
};
const HAN_SCALES: Readonly<Record<string, number>> = { 十: 10, 百: 100, 千: 1000 };
const HAN_WEEKDAYS: Readonly<Record<string, string>> = {
  一: "monday",
  二: "tuesday",
  三: "wednesday",
  四: "thursday",
  五: "friday",
  六: "saturday",
  日: "sunday",
  天: "sunday",
};

/** Counts only before these: elsewhere a numeral is part of a word (一起, 百度, 万一). */
const HAN_COUNTED =
  /^[个元块天年月日号岁次人米斤周秒倍层楼级折角毛位名条张本件台辆届集章节课季页升克寸]|^(?:分钟|小时|星期|礼拜|公里|公斤|千克|厘米|毫米|英里|钟头|点钟)|^点(?![击头儿])/;
/** One of these with 一 is an article: 一个问题 is "a problem". */
const HAN_ARTICLE = /^[次人位名条张本件台辆块层级]|^个(?!月|小时|星期|礼拜|钟头)/;

function pushHan(text: string, before: string, after: string, found: Quantity[]): void {
  const isOrdinal = /第$/.test(before);
  const isShare = /百分之$/.test(before);
  if (!/[零〇一二两三四五六七八九十]/.test(text)) return; // 千万, 万一: words.
  const isLarge = /[一二两三四五六七八九十][百千万亿]/.test(text); // 一万 needs no unit.
  if (!isOrdinal && !isShare && !isLarge && !HAN_COUNTED.test(after)) return;
  if (!isOrdinal && text === "一" && HAN_ARTICLE.test(after)) return;
  if (text === "一" && after.startsWith("点")) return; // 一点: a little.
  found.push({ value: hanValue(text), unit: isShare ? PERCENT : unitAfter(after, true) });
}

function hanValue(text: string): string {
  const [whole = "", fraction] = text.split("点");
  const tail =
    fraction === undefined ? "" : `.${[...fraction].map((one) => HAN_DIGITS[one]).join("")}`;
  // Digit by digit: 二〇二四, 一九九八. The text is kept, however long.
  if (!/[十百千万亿]/.test(whole)) {
    return trimmed(`${[...whole].map((one) => HAN_DIGITS[one]).join("")}${tail}`);
  }
  let total = 0;
  let section = 0;
  let digit = 0;
  let last = 1;
  for (const one of whole) {
    const scale = HAN_SCALES[one];
    if (scale !== undefined) {
      section += (digit === 0 ? 1 : digit) * scale;
      digit = 0;
      last = scale;
    } else if (one === "万" || one === "亿") {
      last = one === "万" ? 1e4 : 1e8;
      total = (total + section + digit) * last;
      section = 0;
      digit = 0;
    } else {
      digit = HAN_DIGITS[one] ?? 0;
      if (digit === 0) last = 1; // 一百零五 is 105, 一百五 is 150.
    }
  }
  const isShort = last >= 100 && digit > 0;
  return trimmed(`${total + section + (isShort ? (digit * last) / 10 : digit)}${tail}`);
}

// ---- English words --------------------------------------------------------------------------------------------

const WORD_VALUES: ReadonlyMap<string, number> = new Map([
  ..."zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    .split(" ")
    .map((word, value) => [word, value] as const),
  ..."twenty thirty forty fifty sixty seventy eighty ninety"
    .split(" ")
    .map((word, index) => [word, (index + 2) * 10] as const),
]);
const WORD_SCALES: ReadonlyMap<string, number> = new Map(
  Object.entries({
    hundred: 100,
    thousand: 1e3,
    lakh: 1e5,
    million: 1e6,
    crore: 1e7,
    billion: 1e9,
    trillion: 1e12,
  }),
);
const ORDINALS: ReadonlyMap<string, number> = new Map(
  Object.entries({
    third: 3,
    fourth: 4,
    fifth: 5,
    sixth: 6,
    seventh: 7,
    eighth: 8,
    ninth: 9,
    tenth: 10,
  }),
);
const WEEKDAYS = new Set(Object.values(HAN_WEEKDAYS));
const MONTHS: ReadonlyMap<string, number> = new Map(
  "january february march april may june july august september october november december"
    .split(" ")
    .flatMap((month, index): [string, number][] => [
      [month, index + 1],
      [month.slice(0, 3), index + 1],
    ]),
);
/** Joins "two hundred and five" to one number; months and weekdays stand alone. */
class NumberWords {
  readonly #found: Quantity[];
  #total = 0;
  #section = 0;
  #count = 0;
  #isOne = false; // The whole number is the word "one".
  #endAt = 0;

  constructor(found: Quantity[]) {
    this.#found = found;
  }

  /** `endAt`: where the word ends in `folded`. */
  read(word: string, folded: string, endAt: number): void {
    const value = WORD_VALUES.get(word);
    const scale = WORD_SCALES.get(word);
    if (value !== undefined) {
      // "five six" are two numbers, "twenty six" is one.
      const isTail = this.#section % 100 >= 20 && this.#section % 10 === 0 && value < 10;
      if (this.#section % 100 > 0 && !isTail) this.flush(folded);
      this.#section += value;
      this.#isOne = word === "one" && this.#count === 0;
      this.#count++;
      this.#endAt = endAt;
      return;
    }
    // After digits, the scale was read with them.
    if (scale !== undefined && !/\d[ -]?$/.test(folded.slice(0, endAt - word.length).slice(-3))) {
      const part = this.#section === 0 ? 1 : this.#section;
      if (scale === 100) this.#section = part * 100;
      else {
        this.#total += part * scale;
        this.#section = 0;
      }
      this.#isOne = false;
      this.#count++;
      this.#endAt = endAt;
      return;
    }
    if (word === "and" && this.#count > 0) return;
    this.flush(folded);
    this.#readAlone(word, folded, endAt);
  }

  /** Ends the number that is being read. "one" alone is a pronoun, unless a unit follows. */
  flush(folded: string): void {
    if (this.#count === 0) return;
    const unit = unitAfter(folded.slice(this.#endAt, this.#endAt + CONTEXT_CHARS), false);
    if (!this.#isOne || unit !== "") {
      this.#found.push({ value: String(this.#total + this.#section), unit });
    }
    this.#total = 0;
    this.#section = 0;
    this.#count = 0;
    this.#isOne = false;
  }

  #readAlone(word: string, folded: string, endAt: number): void {
    const ordinal = ORDINALS.get(word);
    const month = MONTHS.get(word);
    if (ordinal !== undefined) this.#found.push({ value: String(ordinal), unit: "" });
    else if (WEEKDAYS.has(word)) this.#found.push({ value: word, unit: WEEKDAY });
    else if (month !== undefined) {
      // march, may and the short forms are other words, too: months only beside a digit.
      const isSure = word.length > 3 && word !== "march";
      const startAt = endAt - word.length;
      const isDated =
        /\d(?:st|nd|rd|th)?(?: of)?[ -]$/.test(folded.slice(Math.max(0, startAt - 8), startAt)) ||
        /^\.?[ -]\d/.test(folded.slice(endAt, endAt + 3));
      if (isSure || isDated) this.#found.push({ value: String(month), unit: MONTH });
    }
  }
}
