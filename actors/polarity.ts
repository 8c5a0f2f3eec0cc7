/**
 * The sense of direction of a text: how often it negates, and which side of a pair of opposites it names.
 *
 * Pure, on folded text (NFKC, lower case). Words that look like a negation or a side and are none (无线, 非常, 关于,
 * "whether or not") are taken out first. Every pattern is a flat list of literals: linear in the text.
 */

/** How often one pair of opposites is named; `pair` points into the table of this file. */
export type Sides = { readonly pair: number; readonly first: number; readonly second: number };

/** Negations in a folded text. Two of them cancel out: callers compare the parity. */
export function negationCount(folded: string): number {
  const plain = folded.replace(NEGATION_FALSE_FRIENDS, " ");
  let count = 0;
  for (const _ of plain.matchAll(NEGATION)) count++;
  return count;
}

/** The pairs of opposites that a folded text names, by pair. */
export function sidesOf(folded: string): Sides[] {
  const counts = new Map<number, [first: number, second: number]>();
  const add = (word: string): boolean => {
    const entries = SIDES.get(word);
    for (const [pair, side] of entries ?? []) {
      const count = counts.get(pair) ?? [0, 0];
      count[side]++;
      counts.set(pair, count);
    }
    return entries !== undefined;
  };
  for (const [, near, far, word = ""] of folded.matchAll(LATIN_SIDE)) {
    const particle = near ?? far;
    if (particle !== undefined) add(`… ${particle}`);
    else baseForms(word).some(add);
  }
  if (HAN.test(folded)) {
    for (const [word] of folded.replace(SIDE_FALSE_FRIENDS, " ").matchAll(HAN_SIDE)) add(word);
  }
  return [...counts]
    .map(([pair, [first, second]]) => ({ pair, first, second }))
    .sort((left, right) => left.pair - right.pair);
}

/**
 * The pair of opposites on which two texts disagree, in words, or undefined: each names one side only and not the same,
 * or they name the pair equally often and split it otherwise ("turn off … on my phone", "turn on … on my phone").
 */
export function sideDifference(
  question: readonly Sides[],
  candidate: readonly Sides[],
): string | undefined {
  for (const mine of question) {
    const other = candidate.find(({ pair }) => pair === mine.pair);
    if (other === undefined) continue;
    const isOpposite =
      (mine.second === 0 && other.first === 0) || (mine.first === 0 && other.second === 0);
    const isSplit =
      mine.first + mine.second === other.first + other.second && mine.first !== other.first;
    if (!isOpposite && !isSplit) continue;
    const [first, second] = names(mine.pair);
    return mine.first > other.first ? `${first} ≠ ${second}` : `${second} ≠ ${first}`;
  }
  return undefined;
}

// ---- negation -------------------------------------------------------------------------------------------------

/**
 * The words that [semantic-cache reference, section 8] counts, and what they are written as in haste. "nor" is not
 * here: "neither … nor" negates once.
 */
const NEGATION =
  /[不没無无非别未否]|\b(?:not|cannot|never|no|non|none|nobody|nothing|nowhere|neither|without|except|[a-z]+n't|(?:do|does|did|is|are|was|were|ca|wo|would|should|could|have|has|had)nt)\b/g;

/** Questions of the form X不X, and words in which the character does not negate. */
const NEGATION_FALSE_FRIENDS = new RegExp(
  [
    String.raw`(\p{Script=Han})[不没]\1`,
    ...(
      "有没有 是否 能否 可否 会否 与否 否则 非常 非洲 南非 除非 是非 特别 区别 差别 分别 级别 性别 类别 识别 " +
      "辨别 鉴别 个别 派别 告别 离别 别人 别的 别名 别墅 别克 别致 未来 不同 不一样 不错 没错 无论 不论 不管 " +
      "无线 无人机 无锡 无限 无穷 差不多 不但 不仅 不光 不止 要不 不过 不如 不断 不久 不锈钢 不好意思 对不起 " +
      "了不起 不得了 不妨 不愧 不禁 没关系 不动产 不客气 感激不尽"
    ).split(" "),
    `[不没](?=[?!.,。~ ]*$)`, // 可以不? asks, it does not deny.
    String.raw`\b(?:whether or not|or not|not only|no matter|if not|why not|no\.? ?(?=\d))`,
  ].join("|"),
  "gu",
);

// ---- opposites ------------------------------------------------------------------------------------------------

/**
 * Pairs of opposites: both sides with their words. "… on" stands behind one of the verbs of LATIN_SIDE only, because
 * "on" and "in" alone are prepositions.
 */
const PAIRS: readonly (readonly [first: string, second: string])[] = [
  ["… on", "… off"],
  ["… in", "… out"],
  ["enable activate", "disable deactivate"],
  ["left", "right"],
  ["increase raise rise grow gain", "decrease reduce lower fall drop lose shrink"],
  ["gain win earn", "lose lost"],
  ["before", "after"],
  ["best", "worst"],
  ["better", "worse"],
  ["good", "bad"],
  ["buy bought purchase", "sell sold"],
  ["start begin", "stop end finish quit"],
  ["open", "close shut"],
  ["more", "less fewer"],
  ["most", "least"],
  [
    "male man men boy guy husband father dad son brother uncle king boyfriend gentleman",
    "female woman women girl lady wife mother mom mum daughter sister aunt queen girlfriend",
  ],
  ["he him his", "she her hers"],
  ["lock", "unlock"],
  ["install", "uninstall remove"],
  ["subscribe", "unsubscribe"],
  ["follow", "unfollow"],
  ["block ban", "unblock unban"],
  ["add insert", "remove delete"],
  ["create", "delete destroy"],
  ["allow permit", "deny forbid block prevent"],
  ["accept approve", "reject decline refuse"],
  ["encrypt", "decrypt"],
  ["encode", "decode"],
  ["compress", "decompress"],
  ["connect", "disconnect"],
  ["mount attach", "unmount detach"],
  ["upload", "download"],
  ["import", "export"],
  ["push", "pull"],
  ["upgrade", "downgrade"],
  ["upper", "lower"],
  ["uppercase", "lowercase"],
  ["up", "down"],
  ["top", "bottom"],
  ["high higher highest", "low lower lowest"],
  ["big bigger biggest large larger largest", "small smaller smallest little"],
  ["long longer longest", "short shorter shortest"],
  ["fast faster fastest quick", "slow slower slowest"],
  ["hot warm", "cold cool"],
  ["old older oldest", "new newer newest"],
  ["old older oldest", "young younger youngest"],
  ["first", "last"],
  ["early earlier earliest", "late later latest"],
  ["maximum max maximize", "minimum min minimize"],
  ["ascending asc", "descending desc"],
  ["north northern", "south southern"],
  ["east eastern", "west western"],
  ["morning", "evening"],
  ["day", "night"],
  ["summer", "winter"],
  ["internal inner inside indoor", "external outer outside outdoor"],
  ["public", "private"],
  ["positive", "negative"],
  ["true", "false"],
  ["advantage pro benefit", "disadvantage con drawback"],
  ["strength", "weakness"],
  ["strong", "weak"],
  ["easy easier easiest", "hard difficult harder hardest"],
  ["cheap cheaper cheapest", "expensive"],
  ["rich", "poor"],
  ["legal", "illegal"],
  ["possible", "impossible"],
  ["safe", "unsafe dangerous"],
  ["able", "unable"],
  ["love like", "hate dislike"],
  ["income revenue", "expense cost"],
  ["debit", "credit"],
  ["deposit", "withdraw withdrawal"],
  ["lend", "borrow"],
  ["hire", "fire"],
  ["teach", "learn"],
  ["arrive arrival", "depart departure leave"],
  ["ancient", "modern"],
  ["married", "single unmarried divorced"],
  ["alive", "dead"],
  ["birth", "death"],
  ["war", "peace"],
  ["开 打开 开通 开启", "关 关闭 关掉 停用"],
  ["开通 注册", "注销 取消"],
  ["绑 绑定", "解绑 解除"],
  ["登录 登陆", "退出"],
  ["增加 提高 提升 增长", "减少 降低 下降"],
  ["加", "减"],
  ["买", "卖"],
  ["上", "下"],
  ["前", "后"],
  ["男 爸 父亲", "女 妈 母亲"],
  ["大", "小"],
  ["多", "少"],
  ["提前", "推迟 延迟 延后 延期"],
  ["借", "还"],
  ["存", "取"],
  ["收入", "支出"],
  ["转入 存入", "转出 取出"],
  ["进", "出"],
  ["升", "降"],
  ["胖", "瘦"],
  ["左", "右"],
  ["长", "短"],
  ["高", "低 矮"],
  ["快", "慢"],
  ["早", "晚"],
  ["新", "旧"],
  ["好", "坏"],
  ["真", "假"],
  ["冷", "热"],
  ["赢", "输"],
  ["赚", "赔 亏"],
  ["最大", "最小"],
  ["最高", "最低"],
  ["最好", "最差"],
  ["南", "北"],
  ["成功", "失败"],
  ["公历 阳历 新历", "农历 阴历 旧历"],
];

const SIDES: ReadonlyMap<string, readonly (readonly [pair: number, side: 0 | 1])[]> = sideTable();

function sideTable(): Map<string, [pair: number, side: 0 | 1][]> {
  const table = new Map<string, [pair: number, side: 0 | 1][]>();
  for (const [pair, sides] of PAIRS.entries()) {
    for (const side of [0, 1] as const) {
      for (const word of sides[side].replaceAll("… ", "…").split(" ")) {
        const key = word.replace("…", "… ");
        table.set(key, [...(table.get(key) ?? []), [pair, side]]);
      }
    }
  }
  return table;
}

function names(pair: number): [first: string, second: string] {
  const [first = "", second = ""] = PAIRS[pair] ?? [];
  const short = (side: string) => side.replace("… ", "").split(" ")[0] ?? "";
  return [short(first), short(second)];
}

const HAN = /\p{Script=Han}/u;

/** A verb with its particle ("turn off", "logout"), also with up to four words between, or a single word. */
const LATIN_SIDE = new RegExp(
  [
    String.raw`\b(?:(?:turn|switch|sign|check|power|log|clock|mov|opt|put|tak)(?:e|ed|es|s|ing|ged|ging)?|get)[ -]?(on|off|in|out)\b`,
    String.raw`\b(?:turn|switch|power)(?:ed|s|ing)?(?: [a-z']{1,20}){1,4}? (on|off)\b`,
    "([a-z]+)",
  ].join("|"),
  "g",
);

const HAN_SIDE = new RegExp(
  [...SIDES.keys()]
    .filter((word) => HAN.test(word))
    .sort((left, right) => right.length - left.length)
    .join("|"),
  "gu",
);

/** Words in which the character names no side. */
const SIDE_FALSE_FRIENDS = new RegExp(
  (
    "关于 关系 相关 有关 无关 关心 关注 关键 海关 机关 开始 离开 公开 开心 开玩笑 开发 " +
    "多少 多久 多长 多大 多高 多远 差不多 至少 大家 大学 大概 大约 大小 大连 大众 小时 小说 小米 小姐 小孩 小学 " +
    "上海 上班 上网 上学 上传 上课 晚上 早上 网上 身上 马上 世上 上诉 一下 下载 下班 下课 上下 下来 上来 " +
    "以前 目前 之前 前提 前景 前途 以后 之后 然后 最后 今后 后果 后来 后台 前后 " +
    "好不好 你好 您好 还是 还有 还能 还要 还没 还可以 还不 进行 出现 出来 出去 进去 进来 出生 推出 演出 " +
    "加油 参加 新疆 真的 认真 真正 长沙 长城 成长 校长 生长 高兴 高考 高中 提高 快乐 快递 早饭 晚饭 短信 热门 " +
    "男女 南京 南昌 南宁 河南 湖南 海南 云南 越南 北京 河北 湖北 存在"
  )
    .split(" ")
    .sort((left, right) => right.length - left.length)
    .join("|"),
  "gu",
);

/** The word, and what it may be an inflection of; the first that the table knows counts. */
function baseForms(word: string): string[] {
  const forms = [word];
  if (word.length <= 3) return forms;
  if (word.endsWith("s")) forms.push(word.slice(0, -1));
  if (word.endsWith("es")) forms.push(word.slice(0, -2));
  if (word.endsWith("ed")) forms.push(word.slice(0, -1), ...undoubled(word.slice(0, -2)));
  if (word.endsWith("ing")) forms.push(`${word.slice(0, -3)}e`, ...undoubled(word.slice(0, -3)));
  if (word.endsWith("ly")) forms.push(word.slice(0, -2));
  return forms;
}

/** A stem, and the stem without the letter that an ending doubled: stopped, stopping. */
function undoubled(stem: string): string[] {
  return stem.length > 3 && stem.at(-1) === stem.at(-2) ? [stem, stem.slice(0, -1)] : [stem];
}
