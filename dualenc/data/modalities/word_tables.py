"""Stop words of some languages, and groups of English words that can stand for each other in a caption."""

from __future__ import annotations

_STOP_WORDS = {
    "en": """a about above after again against all also am an and any are as at be because been before being below
    between both but by can did do does doing down during each few for from further had has have having he her here
    hers him his how i if in into is it its itself just me more most my nor of off on once only or other our out over
    own same she so some such than that the their them then there these they this those through to too under until up
    very was we were what when where which while who whom why will with you your""",
    "de": """aber alle als am an auch auf aus bei bin bis da dann das dass dein deine dem den der des die dies diese
    diesem diesen dieser dieses doch dort du durch ein eine einem einen einer eines er es etwas euch euer für hat haben
    hier ich ihm ihn ihr ihre ihrem ihren im in ins ist ja jede jedem jeden jeder jedes jene jetzt kann man mein meine
    mit nach noch nur ob oder sein seine seinem seinen sich sie sind so über um und uns unser unter vom von vor war
    waren was weil welche wenn wer wie wir wird wo zu zum zur""",
    "fr": """à ai au aux avec ce ces cet cette comme d dans de des du elle elles en entre est et eu il ils j je l la le
    les leur leurs lui m ma mais me mes moi mon n nos notre nous on ont ou où par pas pour qu que qui s sa sans se ses
    si son sont sous sur t ta te tes toi ton tu un une vers vos votre vous y été être""",
    "es": """a al algo ante antes como con cual cuando de del desde donde e el ella ellas ellos en entre era es esa ese
    eso esta está están este esto fue ha han hasta hay la las le les lo los mas me mi mientras muy más ni nos o os otra
    otro para pero por porque que qué se ser si sin sobre son su sus también te tu tus un una unas uno unos y ya yo""",
    "it": """a ad agli ai al alla alle allo anche c che chi ci come con da dagli dai dal dalla dalle dallo degli dei
    del della delle dello di dove e è ed era gli ha hanno i il in io l la le lei li lo loro lui ma mi mia mio ne negli
    nei nel nella nelle nello noi non nostra nostro o per più quale quando quella quello questa questo se si sono sta su
    sua sue sugli sui sul sulla sulle sullo suo te ti tra tu tua tuo un una uno vi voi""",
}
STOP_WORDS = {language: frozenset(words.split()) for language, words in _STOP_WORDS.items()}
"""Language → words that say little by themselves. Words of negation and number are not among the English ones."""

_SYNONYMS = """
big large; huge enormous giant; small little tiny; quick fast; quickly rapidly; happy glad cheerful; sad unhappy
kid child; kids children; man guy; men guys; woman lady; women ladies; boy lad; girl lass; baby infant; people persons
dog hound; dogs hounds; puppy pup; cat kitty; bunny rabbit; pony horse; cow cattle; bird fowl
car automobile; bike bicycle; bikes bicycles; motorbike motorcycle; motorcyclist biker; boat ship; plane airplane
street road; path trail; sidewalk pavement; hill slope; mountain peak; woods forest; sea ocean; beach shore seaside
river stream; lake pond; grass lawn; field meadow; rock stone; rocks stones; cliff precipice; dirt soil; snow snowfall
house home; building structure; shop store; couch sofa; seat chair; rug carpet; picture image; photo photograph
picture-frame frame; cup mug; bag sack; box crate; hat cap; coat jacket; shirt top; trousers pants; shoes footwear
shore coast; crowd throng; group bunch; team squad; player athlete; match game; ball sphere
jumping leaping; jumps leaps; jump leap; running racing; runs races; run race; walking strolling; walks strolls
looking gazing; looks gazes; look gaze; watching observing; watches observes; smiling grinning; smiles grins
shouting yelling; shouts yells; talking speaking chatting; talks speaks; holding gripping; holds grips
throwing tossing; throws tosses; catching grabbing; catches grabs; pulling dragging; pulls drags; climbing scaling
climbs scales; sitting seated; resting relaxing; rests relaxes; sleeping snoozing; sleeps snoozes; eating munching
eats munches; riding driving; begins starts; begin start; ends finishes; falls drops; flying soaring; flies soars
pretty beautiful lovely; ugly unsightly; old aged; young youthful; wet soaked; dirty muddy; clean tidy; bright vivid
dark dim; gray grey; blond blonde; purple violet; orange tangerine; red crimson; yellow golden; beige tan
near beside; close nearby; behind back; many numerous; several various; together jointly; almost nearly; often
frequently; round circular; circle disc; square quadrate; heart love; star asterisk; face visage; smile grin
symbol sign; button key; arrow pointer; letter character; number digit; clock timepiece; phone telephone; tv television
mail post; present gift; doctor physician; policeman officer; soldier trooper; farmer grower; cook chef; bag pouch
noise sound; loud noisy; quiet silent; sings chants; bark barking; storm tempest; wind breeze; rain drizzle
"""


def _groups(text: str) -> dict[str, tuple[str, ...]]:
    """word → the others of its groups."""
    out: dict[str, tuple[str, ...]] = {}
    for group in " ".join(text.replace("\n", ";").split()).split(";"):
        words = group.split()
        for word in words:
            out[word] = (*out.get(word, ()), *(w for w in words if w != word))
    return {word: others for word, others in out.items() if others}


SYNONYMS = {"en": _groups(_SYNONYMS)}
"""Language → word → words that can stand for it."""
