"""Common English words by kind: the slots of the grammar, its plurals, and the words that sound alike."""

from __future__ import annotations

_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand"
)
NUMBERS = _NUMBERS.split()

_BY_SLOT = {
    "count": "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty",
    "hour": "one two three four five six seven eight nine ten eleven twelve",
    "minute": "five ten fifteen twenty thirty forty",
    "tens": "twenty thirty forty fifty sixty seventy eighty ninety",
    "unit": "one two three four five six seven eight nine",
    "ordinal": "first second third fourth fifth sixth seventh eighth ninth tenth last next",
    "colour": (
        "red blue green yellow black white brown orange purple pink gray golden silver violet crimson turquoise"
    ),
    "size": "big small little large tiny huge long short tall wide narrow heavy light thick thin enormous",
    "quality": (
        "old new clean dirty broken cheap expensive beautiful ugly strange simple strong soft hard wet dry warm "
        "cold hot cool empty full round square flat sharp smooth rough shiny fancy plain modern ancient famous "
        "perfect useful special lovely comfortable dangerous different favorite delicate pretty ordinary wonderful "
        "terrible valuable secret curious foreign local noisy"
    ),
    "person_quality": (
        "young old happy sad angry tired hungry thirsty kind clever brave lazy busy friendly funny quiet loud "
        "polite rude honest careful nervous lonely proud shy strong weak gentle serious patient famous rich poor "
        "stubborn cheerful grateful jealous generous confident creative intelligent elderly healthy curious"
    ),
    "feeling": (
        "happy sad angry tired hungry thirsty afraid lonely proud sick ready late early busy excited surprised "
        "confused worried bored calm nervous upset lucky sorry safe cold warm awake asleep alone hurt lost"
    ),
    "thing": (
        "cup plate bowl knife fork spoon glass bottle pan pot kettle basket box bag bucket broom towel pillow "
        "blanket candle lamp clock mirror picture book pen pencil letter notebook newspaper magazine map key lock "
        "phone camera radio computer keyboard screen printer battery button needle ring watch wallet purse umbrella "
        "suitcase ticket envelope stamp card coin toy doll puzzle balloon ball kite bell whistle brush comb soap "
        "sponge mop ladder hammer rope chain hook nail screwdriver wrench saw shovel rake hose tent flashlight "
        "compass lighter carpet curtain cushion drawer shelf table chair sofa desk bench stool bed cabinet door "
        "window vase jar tray napkin folder calendar poster statue helmet backpack remote charger cable magnet "
        "trophy medal ribbon parcel package bracelet necklace thermometer scissors microphone speaker telescope "
        "passport blender toaster"
    ),
    "clothing": (
        "shirt jacket coat hat scarf sweater dress skirt belt tie cap vest uniform glove sock boot shoe sandal "
        "slipper raincoat costume apron robe hood"
    ),
    "food": (
        "bread butter cheese rice pasta soup salad chicken beef pork fish bacon ham sausage pizza cake pie "
        "chocolate candy honey jam sugar salt pepper cereal yogurt pancake sandwich burger noodles popcorn toast "
        "garlic mustard vinegar cream pudding omelet stew"
    ),
    "fruit": (
        "apple banana orange lemon peach cherry strawberry melon mango pineapple grape coconut apricot potato "
        "tomato carrot onion cabbage cucumber pumpkin mushroom spinach lettuce broccoli walnut peanut raspberry"
    ),
    "drink": "water milk coffee juice lemonade wine cocoa soda smoothie espresso",
    "animal": (
        "dog cat horse cow pig sheep goat rabbit mouse rat lion tiger elephant monkey zebra giraffe wolf fox "
        "squirrel chicken duck goose turkey eagle owl parrot penguin pigeon crow swan frog snake turtle lizard "
        "crocodile shark whale dolphin octopus spider bee butterfly ant mosquito donkey camel kangaroo leopard "
        "hamster kitten puppy seagull beetle snail worm panda gorilla otter beaver hedgehog raccoon peacock lobster "
        "crab salmon ladybug cheetah buffalo raven falcon"
    ),
    "place": (
        "park school library museum hospital hotel station airport market bakery restaurant office factory church "
        "castle bridge beach forest mountain river lake island village city garden farm theater cinema stadium "
        "pharmacy bank harbor zoo desert valley cave tower prison palace university playground supermarket gym cafe "
        "temple lighthouse warehouse waterfall cottage campsite courthouse laboratory monument highway corner "
        "border neighborhood parking shop"
    ),
    "room": (
        "kitchen bathroom bedroom garage basement attic hallway balcony closet cellar lobby classroom elevator "
        "corridor porch nursery pantry"
    ),
    "job": (
        "teacher doctor nurse farmer baker driver pilot singer writer painter lawyer engineer waiter dentist "
        "soldier sailor plumber carpenter mechanic butcher judge actor dancer musician scientist student professor "
        "manager secretary gardener fisherman journalist photographer librarian policeman firefighter barber tailor "
        "captain coach detective architect cashier chef clown guard president queen prince princess magician "
        "electrician athlete director programmer receptionist"
    ),
    "family": (
        "mother father sister brother uncle grandmother grandfather cousin husband wife daughter neighbor friend "
        "boss nephew niece partner roommate colleague stepfather"
    ),
    "name": (
        "anna peter maria david laura thomas emma james sarah daniel julia michael lucy robert alice george sophie "
        "henry martha oliver hannah victor nina simon clara oscar grace felix rosa edward amanda kevin diana martin "
        "susan paul helen philip linda arthur nancy walter"
    ),
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "month": "january february march april june july august september october november december",
    "season": "spring summer autumn winter",
    "when": "today tomorrow yesterday tonight now later again soon together alone",
    "part_of_day": "morning afternoon evening night weekend",
    "weather": "sunny rainy cloudy windy foggy snowy stormy freezing humid chilly icy mild",
    "country": (
        "france germany spain italy china japan india brazil canada mexico egypt russia england ireland sweden "
        "norway poland turkey africa america australia europe london paris berlin tokyo chicago boston"
    ),
    "vehicle": (
        "car bus train truck bicycle motorcycle boat ship airplane helicopter taxi tractor van scooter ambulance "
        "rocket subway canoe ferry wagon"
    ),
    "sport": ("football tennis basketball hockey golf baseball chess volleyball boxing cricket badminton rugby cards"),
    "instrument": "piano guitar violin drum flute trumpet harp cello organ saxophone banjo clarinet",
    "subject": (
        "music history science art math geography english biology physics chemistry literature economics politics "
        "philosophy medicine religion"
    ),
    "material": ("wood metal plastic paper stone leather cotton wool silk rubber gold iron steel ivory concrete"),
    "body": (
        "head hand arm leg foot knee shoulder back neck face ear finger thumb stomach elbow ankle chest tooth "
        "tongue chin wrist throat skin heart"
    ),
    "nature": (
        "sun moon sky star cloud wind rain snow storm tree grass leaf branch root flower rose bush hill rock sand "
        "mud ice fire smoke ocean wave stream path field meadow rainbow thunder lightning fog pond planet volcano "
        "sunset"
    ),
    "idea": (
        "problem question answer story song game movie plan trip party meeting lesson test exam job holiday "
        "birthday wedding dream joke secret idea message concert race journey festival experiment project "
        "competition conversation accident adventure mistake decision promise surprise discount argument discussion "
        "education language performance vacation"
    ),
    "do": (
        "open close clean wash paint fix move carry push pull lift drop break hide find buy sell borrow return "
        "check choose count collect bring take hold keep throw catch pack wrap cover fill empty drag measure draw "
        "copy examine replace repair remove deliver"
    ),
    "did": (
        "opened closed cleaned washed painted fixed moved carried pushed pulled lifted dropped broke hid found "
        "bought sold borrowed returned checked chose counted collected brought took held kept threw caught packed "
        "wrapped covered filled stole saw lost forgot remembered noticed repaired delivered examined destroyed "
        "measured"
    ),
    "does": (
        "likes loves hates wants needs sees has finds buys sells uses makes keeps remembers collects cleans carries "
        "watches follows knows prefers enjoys"
    ),
    "act": (
        "run walk swim dance sing jump climb sleep eat drink read write cook drive fly ride work study play talk "
        "listen laugh cry smile wait rest travel fish shout whisper practice argue exercise"
    ),
    "acting": (
        "running walking swimming dancing singing jumping climbing sleeping eating drinking reading writing cooking "
        "driving flying riding working studying playing talking listening laughing crying smiling waiting resting "
        "traveling fishing shouting whispering practicing arguing barking"
    ),
    "acted": (
        "ran walked swam danced sang jumped climbed slept ate cooked drove worked studied played talked listened "
        "laughed cried smiled waited rested traveled shouted whispered arrived left stopped fell disappeared "
        "returned"
    ),
    "how": (
        "slowly quickly quietly loudly carefully happily easily early late often always never sometimes well badly "
        "gently suddenly alone together outside inside everywhere upstairs downstairs politely bravely silently "
        "nervously patiently immediately"
    ),
    "where": "under behind near beside inside above below around against across",
    "who": "he she",
    "they": "they we you",
    "my": "my your his her our their",
    "unit_of_time": "seconds minutes hours days weeks months years",
    "unit_of_length": "miles meters feet inches kilometers",
    "money": "dollars cents euros",
}
SLOTS: dict[str, list[str]] = {slot: text.split() for slot, text in _BY_SLOT.items()}
"""Words that may fill each slot of the grammar's templates."""

PLURAL_SLOTS = ("thing", "clothing", "fruit", "animal", "vehicle", "job", "place", "family")
"""Kinds with plurals: the slots `things`, `animals` and so on hold them."""

_IRREGULAR = {
    "mouse": "mice",
    "sheep": "sheep",
    "goose": "geese",
    "fisherman": "fishermen",
    "policeman": "policemen",
    "wolf": "wolves",
    "knife": "knives",
    "shelf": "shelves",
    "wife": "wives",
    "salmon": "salmon",
    "buffalo": "buffalo",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "scissors": "scissors",
    "spinach": "spinach",
    "broccoli": "broccoli",
    "lettuce": "lettuce",
    "parking": "parking",
}
_UNCOUNTED = {"scissors", "spinach", "broccoli", "lettuce", "parking", "soap"}

_ALIKE = (
    "two to too; one won; four for fore; eight ate; red read; blue blew; sun son; meat meet; flower flour; pear pair; "
    "right write; our hour are; by buy bye; weak week; see sea sees seas; there their; know no; knows nose; hear "
    "here; wear where; root route; saw sore; aunt ant; bee be; whale wail; horse hoarse; deer dear; hole whole; mail "
    "male; tail tale; road rode; sail sale; wait weight; week weak; wood would; break brake; peace piece; plain "
    "plane; poor pour; steel steal; stair stare; cent sent cents; ring wring; rows rose; rap wrap; night knight; new "
    "knew; knot not; in inn; i eye; you ewe; we wee; feet feat; bread bred; beet beat; thyme time; nun none; herd "
    "heard; hair hare; bear bare; cell sell; seller cellar; great grate; chews choose; guest guessed; past passed; "
    "sink sync; sore soar; stationary stationery; sweet suite; threw through; toe tow; wine whine; way weigh; which "
    "witch; died dyed; fair fare; role roll; some sum; sole soul; cheap cheep; clothes close; he'll heal heel; tie "
    "thai; belt bell; march marsh; prince prints; patients patient patience; board bored; caught court; bald bold; "
    "mall maul; ordinary ornery; than then; of off; a an the; his is; and an; her or"
)
HOMOPHONES = tuple(frozenset(group.split()) for group in _ALIKE.split("; "))
"""Words that sound alike, or nearly so in fluent speech: none is asked about where another is spoken."""


def plural(word: str) -> str:
    """The plural of a noun."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    return word + "s"


def slots() -> dict[str, list[str]]:
    """Words of every slot, with the plurals."""
    plurals = {f"{kind}s": [plural(word) for word in SLOTS[kind] if word not in _UNCOUNTED] for kind in PLURAL_SLOTS}
    return {**SLOTS, **plurals}


def sounds_like(word: str) -> frozenset[str]:
    """The word and its homophones."""
    return frozenset({word}).union(*(group for group in HOMOPHONES if word in group))
