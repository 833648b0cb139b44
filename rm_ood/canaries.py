"""Texts that stand for something: canaries, everyday talk, other scripts, code. All written for this package.

Each is a (prompt, response) pair. What they say does not matter; that they never change does: a canary's score is
compared with the one that a saved guard recorded.
"""

from __future__ import annotations

Pair = tuple[str, str]

# Changing one of these breaks every saved guard that recorded it.
CANARIES: tuple[Pair, ...] = (
    ("Tell me about the town where you grew up.", "It was a small town by a river, with one bakery and a long bridge."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so blue reaches us from all sides."),
    ("def add(a, b):", "    return a + b\n\nprint(add(2, 3))"),
    ("12 * 12 = ?", "144. And pi is 3.14, 1,000 / 8 = 125."),
    ("今天天气怎么样？", "今天晴天，很暖和。"),
    ("كيف حالك اليوم؟", "أنا بخير، شكرا لك."),
    ("Où est le café? 😀", "À côté de la gare, naïve question! 🚂🎉"),
    ("List three fruits.", "1. apple\n2. pear\n3. plum"),
)

EVERYDAY: tuple[Pair, ...] = (
    (
        "How do I boil an egg so that the yolk stays soft?",
        "Put it in boiling water for six minutes, then cool it under the tap.",
    ),
    (
        "What should I pack for a weekend in the mountains?",
        "Warm layers, a rain jacket, good shoes, water and something to eat.",
    ),
    ("Can you suggest a name for a grey cat?", "Smoke would suit a grey cat well. Pebble is another good one."),
    (
        "Why do my tomatoes split before they are ripe?",
        "Usually because they get a lot of water after a dry spell. Water them evenly.",
    ),
    ("How can I fall asleep faster?", "Keep the room cool and dark, and put your phone away an hour before bed."),
    (
        "Write a short birthday message for my sister.",
        "Happy birthday! I hope the year ahead brings you rest, laughter and a lot of cake.",
    ),
    (
        "What is the difference between jam and jelly?",
        "Jam has pieces of fruit in it. Jelly is made from the juice alone.",
    ),
    (
        "My bike chain keeps falling off. What can I do?",
        "Check whether the chain is worn and whether the derailleur is bent, and adjust the limit screws.",
    ),
    (
        "How many people fit around a table that is two metres long?",
        "Six sit comfortably: two along each side and one at each end.",
    ),
    ("Is it rude to leave a party early?", "Not if you thank the host before you go."),
    (
        "Give me an idea for a rainy afternoon with two children.",
        "Build a den from blankets and read a story inside it with a torch.",
    ),
    ("What makes bread rise?", "Yeast eats sugar in the dough and gives off gas, which the dough traps in bubbles."),
    (
        "How do I ask my boss for a day off?",
        "Ask early, say which day you need, and offer to hand over anything urgent.",
    ),
    ("Which houseplant can live in a dark corner?", "A snake plant does well with little light and little water."),
    (
        "How do I get a coffee stain out of a shirt?",
        "Rinse it with cold water at once, then soak it in water with a little vinegar.",
    ),
    (
        "What do people mean by a white lie?",
        "A small untruth that is told to be kind, such as praising a dull present.",
    ),
    (
        "Should I buy or rent skis for my first trip?",
        "Rent them. You can change the length, and you will know later what suits you.",
    ),
    (
        "Describe a quiet morning by the sea.",
        "The tide is out, the sand is cold, and the only sound is a gull above the pier.",
    ),
    (
        "How long does it take to learn the guitar?",
        "Simple songs come within a few months if you play a little every day.",
    ),
    ("Why do we yawn when others yawn?", "Nobody is quite sure, but it seems to go with noticing what others feel."),
    ("What is a good way to start a speech?", "Begin with a short story that leads straight to your point."),
    (
        "How can I save money on groceries?",
        "Plan the week's meals, buy what is in season, and never shop when you are hungry.",
    ),
    (
        "My neighbour plays loud music at night. What should I do?",
        "Talk to them in daylight and tell them kindly how much you hear.",
    ),
    (
        "What is the best time of year to plant a tree?",
        "Late autumn, when the tree rests and the ground is still soft.",
    ),
    ("How do clouds form?", "Warm air rises and cools, and the water in it gathers into tiny drops."),
    ("Can I freeze cooked rice?", "Yes. Cool it quickly, freeze it in portions, and heat it until it steams."),
    (
        "What is a simple exercise for a stiff neck?",
        "Turn your head slowly to each side and hold it there for a few breaths.",
    ),
    ("How do I write a good thank-you note?", "Name the gift, say how you will use it, and keep it short."),
    (
        "Why is my cake always dry?",
        "It is probably baked too long. Take it out when a few crumbs still stick to the knife.",
    ),
    (
        "What should I see on a single day in an old city?",
        "Walk from the market to the cathedral, and leave the afternoon for side streets.",
    ),
    (
        "How do I teach my dog to wait?",
        "Start with one second, reward it, and make the wait a little longer each time.",
    ),
    (
        "What is the point of a second coat of paint?",
        "It evens out the colour and covers the spots that the first one missed.",
    ),
    ("How often should I change the water in a vase?", "Every other day, and cut the stems a little when you do."),
    (
        "Is it better to run in the morning or in the evening?",
        "Whenever you will really do it. The body gets used to either.",
    ),
    (
        "Explain to a child why the moon changes its shape.",
        "The sun lights one half of it, and we see that half from a different side each night.",
    ),
    (
        "What could I cook with potatoes, onions and eggs?",
        "A Spanish omelette: fry the potatoes and onions slowly, then add the eggs.",
    ),
    (
        "How do I keep my glasses from fogging up?",
        "Wash them with soapy water, and let the mask or scarf sit closer to your nose.",
    ),
    (
        "What is a polite way to refuse an invitation?",
        "Thank them, say that you cannot come, and wish them a good evening.",
    ),
    ("Why does ice float?", "Water takes more room when it freezes, so ice is lighter than the water around it."),
    ("What do I need to play chess?", "A board, sixteen pieces for each side, and someone to play against."),
)

# Script, as Unicode names its letters -> talk in a language that is written in it.
SCRIPTS: dict[str, tuple[Pair, ...]] = {
    "CYRILLIC": (
        (
            "Как приготовить борщ на четыре человека?",
            "Сварите бульон, добавьте свёклу, капусту и картофель и варите ещё сорок минут.",
        ),
        ("Почему осенью желтеют листья?", "Дни становятся короче, и дерево перестаёт делать зелёный пигмент."),
        ("Як краще вивчати нову мову?", "Щодня потроху читати, слухати і розмовляти з людьми."),
    ),
    "GREEK": (
        ("Πώς φτιάχνω καλό ελληνικό καφέ;", "Βάλε νερό, καφέ και ζάχαρη στο μπρίκι και ζέστανέ τα αργά."),
        ("Γιατί η θάλασσα είναι αλμυρή;", "Τα ποτάμια φέρνουν άλατα από τα βράχια εδώ και εκατομμύρια χρόνια."),
    ),
    "ARABIC": (
        ("كيف أتعلم السباحة بسرعة؟", "ابدأ في ماء ضحل مع مدرب، وتدرب ثلاث مرات في الأسبوع."),
        ("ما هي أفضل هدية لصديق قديم؟", "كتاب يحبه أو صورة تجمعكما من أيام الدراسة."),
    ),
    "HEBREW": (
        ("איך מכינים סלט ירקות טרי?", "חותכים עגבניות ומלפפונים, מוסיפים שמן זית, לימון ומעט מלח."),
        ("למה חתולים אוהבים קופסאות?", "הם מרגישים בטוחים במקום קטן וסגור."),
    ),
    "DEVANAGARI": (
        ("सुबह जल्दी उठने का आसान तरीका क्या है?", "रात को समय पर सोइए और खिड़की का परदा थोड़ा खुला रखिए।"),
        ("चाय में अदरक क्यों डालते हैं?", "अदरक से स्वाद बढ़ता है और गले को आराम मिलता है।"),
    ),
    "CJK": (
        ("怎样才能学好做饭？", "先从简单的菜开始，每周试一道新菜，记下用了多少盐和油。"),
        ("为什么冬天白天比较短？", "因为地球的轴是斜的，冬天太阳照到我们这里的时间更少。"),
    ),
    "HIRAGANA": (
        (
            "おいしいごはんのたきかたをおしえてください。",
            "おこめをよくあらって、みずにつけてから、ゆっくりたいてください。",
        ),
        ("どうしてそらはあおいのですか？", "ひかりのなかであおいいろがいちばんよくちらばるからです。"),
    ),
    "HANGUL": (
        ("주말에 가족과 무엇을 하면 좋을까요?", "가까운 산에 올라가서 도시락을 먹고 사진을 찍어 보세요."),
        ("김치는 얼마나 오래 보관할 수 있나요?", "냉장고에 두면 몇 달 동안 먹을 수 있어요."),
    ),
    "THAI": (
        ("ทำอย่างไรให้นอนหลับง่ายขึ้น", "ปิดไฟ ปิดโทรศัพท์ และดื่มนมอุ่นก่อนนอน"),
        ("ทำไมฝนตกบ่อยในหน้าร้อน", "เพราะอากาศร้อนพาไอน้ำขึ้นไปรวมกันเป็นเมฆ"),
    ),
}

CODE: tuple[Pair, ...] = (
    (
        "def mean(values):\n    if not values:\n        return 0.0\n    return sum(values) / len(values)",
        'for i in range(10):\n    total += table[i][0] * weight\nprint(f"{total:.3f}")',
    ),
    (
        "SELECT name, COUNT(*) FROM orders JOIN users ON users.id = orders.user_id GROUP BY name;",
        "CREATE TABLE items (id INTEGER PRIMARY KEY, price REAL NOT NULL, tag TEXT);",
    ),
    (
        "#include <stdio.h>\nint main(void) { int *p = NULL; return p ? *p : 0; }",
        "while ((c = getchar()) != EOF) { buf[n++] = (char)c; if (n >= SIZE) break; }",
    ),
    (
        "const load = async (url) => { const r = await fetch(url); return r.json(); };",
        "items.filter(x => x.id !== null).map(({ id, ...rest }) => [id, rest]);",
    ),
    (
        '<div class="row"><img src="a.png" alt=""/><ul><li>one</li></ul></div>',
        ".row > li:nth-child(2n+1) { margin: 0 auto; color: #fff; }",
    ),
    (
        "fn parse(s: &str) -> Result<u32, ParseIntError> { s.trim().parse::<u32>() }",
        "impl<T: Clone> Iterator for Ring<T> { type Item = T; }",
    ),
    (
        "for f in *.log; do grep -c 'ERROR' \"$f\" >> counts.txt || exit 1; done",
        "find . -name '*.tmp' -mtime +7 -print0 | xargs -0 rm -f",
    ),
    ('{"id": 17, "tags": ["a", "b"], "size": {"w": 640, "h": 480}, "ok": true}', "[[1, 0, 0], [0, 1, 0], [0, 0, 1]]"),
    (
        "public static int max(int[] a) { int m = a[0]; for (int x : a) m = Math.max(m, x); return m; }",
        'try { stream.close(); } catch (IOException e) { log.warn("close", e); }',
    ),
    ("^(?:[a-z0-9]+[._-])*[a-z0-9]+@[a-z0-9-]+\\.[a-z]{2,}$", "s/\\bfoo(\\d+)\\b/bar_$1/g; tr/A-Z/a-z/;"),
)
