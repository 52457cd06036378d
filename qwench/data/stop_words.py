"""The most frequent function words of languages that write spaces between words.

They tell close languages apart in short texts (`data.language`) and prose from lists (`data.rules`); a word that
several languages share stands in the list of each. Lower case; languages by ISO 639-1 code.
"""

from __future__ import annotations

_LISTS = {
    "en": "the be to of and that have with is in it for on was are as this by at from not or an but they you his "
    "her which we",
    "de": "der die das und in zu den von mit ist des auf für im nicht ein eine dem sich auch es an als werden aus "
    "er hat dass sie wird "
    "bei sind nach am einen einer oder um noch wie ich aber",
    "fr": "le la les de des et en un une du est que dans pour qui au sur pas par plus avec ne se sont ce il ont à "
    "aux cette être mais "
    "je vous nous leur son sa été fait",
    "es": "el la los las de y en que un una del se con por para es al lo como más su sus no pero fue son ha este "
    "esta entre también "
    "hay muy ser está era cuando",
    "it": "il la di e che in un una del per è con non sono da della i gli le dei nel si al come più ma anche alla "
    "dal ha lo delle questo "
    "nella ed se essere suo stato",
    "pt": "o a de e que do da em um uma para com não os no se na por mais as dos como mas foi ao ele das tem à seu "
    "sua ou é são pelo "
    "pela isso também muito ser você eu está",
    "nl": "de het een en van in is dat op te zijn met voor niet aan er die ook als bij maar om naar uit door over "
    "wordt hij nog heeft "
    "dan deze werd ze wat was worden kan je ik",
    "sv": "och att det i en är som på för av med den till inte har de ett om från var men så jag vi kan när eller "
    "över ska man hade "
    "efter också finns nu bara sig mot vid",
    "da": "og at det i en er som på for af med den til ikke har de et om fra var men så jeg vi kan der når eller "
    "efter også nu sig mod "
    "ved hvor blev være havde skal han mig hvad ud",
    "no": "og at det i en er som på for av med den til ikke har de et om fra var men så jeg vi kan der når eller "
    "etter også nå seg mot "
    "ved hvor ble være hadde skal han meg hva ut ei",
    "fi": "ja on ei että se oli ovat joka mutta kun myös niin tai kuin jos hän sen ole vain mitä siitä hänen voi "
    "nyt jo olla sitä tämä "
    "minä ne jonka jotka kanssa vielä sekä mukaan oli",
    "pl": "i w na z do że się nie to jest o po za od jak ale przez co dla są tym który jego przy już był oraz było "
    "tylko lub może także "
    "które bardzo czy tego być która mnie",
    "cs": "a v na se že je to do z o jsem si ale s jako které by pro i za po která který jsou jeho nebo již při "
    "byl tak však ve od co "
    "bylo až mu jen také být není aby ze jak",
    "sk": "a v na sa že je to do z o som si ale s ako ktoré by pre i za po ktorá ktorý sú jeho alebo už pri bol "
    "tak však vo od čo bolo "
    "až mu len tiež byť nie aby zo",
    "ro": "și în de la a că cu o pe nu din este un pentru care mai au fi ca sunt se ce al fost să ale prin lui dar "
    "sau după am acest "
    "această era unei între ei cel către si",
    "hu": "a az és hogy nem is egy ez volt de csak már meg van el ki mint még vagy azt ha lehet nagyon minden "
    "akkor ezt kell szerint "
    "után között több voltak lesz sem mert aki amely",
    "tr": "ve bir bu da de için ile olarak çok daha olan gibi ne kadar en o ama var değil sonra her ise ki ancak "
    "göre mi olduğu tarafından "
    "olduğunu ya oldu hem yeni diye ben",
    "ca": "el la els les de i en que un una del amb per és al no més com per a però va són ha aquest aquesta entre "
    "també seva seu molt "
    "dels als hi ho es pel quan sense fins ser",
    "id": "dan yang di untuk dengan pada dari ini itu dalam tidak adalah akan oleh juga ke bisa karena tersebut "
    "telah ada saat sebagai "
    "dapat mereka sudah atau lebih kepada bahwa kata seperti saya anda",
    "ms": "dan yang di untuk dengan pada dari ini itu dalam tidak adalah akan oleh juga ke boleh kerana tersebut "
    "telah ada sebagai dapat "
    "mereka sudah atau lebih kepada bahawa beliau ialah iaitu saya",
    "vi": "và của là có không được cho trong một các những với người đã này để từ khi như đến về cũng ra nhiều tại "
    "vào thì sẽ ông theo "
    "năm mà trên lại còn phải",
    "hr": "i u je na se da za su od s o a ne kako koji će što bi nije to sam ili kao iz do te po ali bio može koja "
    "koje još više samo",
    "sl": "in je v na se da za so z ki od s o pa ne kot bi ni to sem ali tudi po ter pri bil še bo lahko kar le",
    "et": "ja on ei et see oli kui ka mis ta ning aga oma või kes siis nii mida seda ma selle pole veel juba välja "
    "olid mitte üle kõik",
    "lv": "un ir ka no ar uz par bet tas kas nav arī kā tika gan vai pie lai ja pēc es viņš tik šo tā to bija",
    "lt": "ir yra kad į iš su tai bet kaip jis apie o ar buvo tik ne nuo už dar po per jau labai taip jo kurie prie",
    "sq": "dhe të e në për me është nga që një i ka si më se nuk ky do kjo janë u por tij ishte",
    "gl": "o a os as de e en que un unha do da con para non se por máis como ao foi na no mais seu súa pola polo",
    "eu": "eta da ez bat zen ere dira izan egin du baina hau duen dute gehiago bere dela hori zuen",
    "af": "die van en in is het nie om te 'n vir aan wat met op dat sy hy ek deur maar ook word as daar hulle of "
    "ons ander elke mag geen",
    "is": "og að í á er sem til við um var en ekki það með fyrir af hann hún þess sé eru eða skal hver þeir sér "
    "rétt allir maður",
    "fo": "og at í er ein á til við ikki sum hevur av fyri ella fólk hvør rætt øll skal vera hansara onnur",
    "sw": "ya na wa kwa ni katika za la kuwa cha hiyo ambao kama huo yake kila mtu pia hii haki au bila yoyote",
    "cy": "y yr a i o yn ar ei am mae ac gan nid eu sydd oedd hyn neu hawl pawb fod dros",
    "ga": "an na agus ar i is a ag le go do de ní ach bhí sé tá gach duine nó ina chun",
    "uz": "va bilan uchun bu bir ham har ega edi emas yoki deb o'z huquqiga inson kerak bo'lgan",
    "eo": "la de kaj en al estas ne por kun ke li mi ĝi esti sur rajton ĉiu aŭ sian",
    "tl": "ang ng sa na mga at ay para hindi ito kanyang may bawat o karapatan kung",
    "az": "və bir bu ilə üçün də olan hər ya onun olaraq malikdir hüququ edən",
    "tg": "ва дар ба аз ки бо ин барои аст ҳар ё дорад ҳуқуқ худ",
    "ky": "жана менен бир үчүн бул да же болуп ар укугу бар",
    "kk": "және мен бір үшін бұл да болып әр құқығы бар",
    "ru": "и в не на что с по как это он из его за к для а от но у же так то все был о или она бы мы вы их было "
    "только если который "
    "при быть были также до",
    "uk": "і в не на що з у як це та за до для є від але він його про або й також був які було ще бути може вже "
    "тільки ми його її "
    "при після який через щоб",
    "bg": "и на да се за от в с е не са по че това как като си ще но до при той след а или му беше има ги само към "
    "още което тя ние "
    "между който които през",
    "sr": "и у је на се да за су од с о а не како који ће што би није то сам или као из до те по али био може које",
    "mk": "и на да се за од во со е не по дека тоа како што ќе но до при тој а или му беше има само кон уште која ги",
    "be": "і ў не на што з у як гэта за да для ад але ён яго пра або таксама быў якія было яшчэ ці які па",
    "el": "και το να του η της για με που ο την στο από τα είναι δεν οι των σε τον στην θα ότι τους μια ένα στη "
    "αλλά τις έχει ή ως",
    "ar": "في من على إلى أن عن التي الذي هذا هذه كان ما لا مع و ذلك كما بعد بين قد كل لم أو هو هي حيث إن قال",
    "fa": "و در به از که این را با است برای آن یک خود تا بر هم نیز شد می ها های شده او اما کرد دارد ما کند بود",
    "ur": "کے کی میں اور کا ہے سے کو نے پر کہ یہ ہیں اس ایک بھی ان تھا ہو جو نہیں کر گیا",
    "he": "של את על לא הוא זה עם כי גם היא אל או אם כל מה אני אבל היה יש אין רק עוד לפי בין אשר כמו זו",
    "hi": "के में की है और से का को पर ने कि यह हैं एक भी नहीं इस ही था हो जो तो कर वह थी गया लिए कहा",
    "mr": "आहे आणि या व ते तर हे हा ही मध्ये होते नाही एक असे केले आहेत त्या झाले की पण मी तो ती",
}
STOP_WORDS = {code: frozenset(words.split()) for code, words in _LISTS.items()}
"""Language -> its most frequent words."""
