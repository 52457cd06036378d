import pytest

from qwench.data.language import chinese_script, identify, script_of

SENTENCES = {
    "en": "The committee agreed that the plan would be finished by the end of the year.",
    "de": "Der Ausschuss hat beschlossen, dass der Plan bis Ende des Jahres fertig wird.",
    "fr": "Le comité a décidé que le projet serait terminé avant la fin de l'année.",
    "es": "El comité decidió que el plan estaría terminado antes de fin de año.",
    "it": "Il comitato ha deciso che il piano sarà pronto entro la fine dell'anno.",
    "pt": "O comité decidiu que o plano estaria pronto antes do fim do ano.",
    "nl": "De commissie heeft besloten dat het plan voor het einde van het jaar klaar is.",
    "sv": "Kommittén beslutade att planen skulle vara klar före årets slut.",
    "da": "Udvalget har besluttet, at planen skal være færdig inden årets udgang, og det er godt.",
    "pl": "Komitet postanowił, że plan będzie gotowy przed końcem roku.",
    "cs": "Výbor rozhodl, že plán bude hotový do konce roku.",
    "fi": "Komitea päätti, että suunnitelma valmistuu ennen vuoden loppua.",
    "tr": "Komite, planın yıl sonundan önce tamamlanmasına karar verdi.",
    "vi": "Ủy ban đã quyết định rằng kế hoạch sẽ hoàn thành trước cuối năm.",
    "ca": "El comitè va decidir que el pla estaria acabat abans de final d'any.",
    "ru": "Комитет решил, что план будет готов до конца года.",
    "uk": "Комітет вирішив, що план буде готовий до кінця року.",
    "bg": "Комитетът реши, че планът ще бъде готов до края на годината.",
    "el": "Η επιτροπή αποφάσισε ότι το σχέδιο θα είναι έτοιμο.",
    "ar": "قررت اللجنة أن الخطة ستكون جاهزة قبل نهاية العام.",
    "fa": "کمیته تصمیم گرفت که این طرح تا پایان سال آماده شود.",
    "he": "הוועדה החליטה שהתוכנית תהיה מוכנה עד סוף השנה.",
    "hi": "समिति ने फैसला किया कि योजना साल के अंत तक तैयार हो जाएगी।",
    "th": "คณะกรรมการตัดสินใจว่าแผนจะแล้วเสร็จก่อนสิ้นปี",
    "ko": "위원회는 연말까지 계획을 완료하기로 결정했다.",
    "ja": "委員会は年末までに計画を完成させることを決めた。",
    "zh": "委员会决定在年底之前完成这个计划。",
}


@pytest.mark.parametrize("lang", SENTENCES)
def test_languages(lang):
    guess = identify(SENTENCES[lang])
    assert guess.lang == lang
    assert guess.score > 0.5
    assert identify(SENTENCES[lang].upper()).lang == lang
    assert identify(SENTENCES[lang] * 20).lang == lang


@pytest.mark.parametrize("text", ["", " \n", "12345", "--- 3.14 !!", "🙂🙂"])
def test_without_letters_there_is_no_language(text):
    assert (identify(text).lang, identify(text).score) == ("", 0.0)


def test_short_texts_are_unsure():
    assert identify("ok").score < 0.9
    assert identify("Привет").script == "Cyrl"


def test_scripts_of_mixed_texts():
    assert script_of("Share on Facebook 一个很长的中文句子在这里") == "Hani"
    assert script_of("これは kanji 漢字漢字漢字漢字 です") == "Kana"
    assert script_of("the word 中文 in English text") == "Latn"
    assert identify("C++ 标准库中的 vector 容器").lang == "zh"
    assert identify("威廉・莎士比亚是英国文学史上最杰出的戏剧家").lang == "zh"


def test_simplified_and_traditional():
    assert chinese_script("这个国家的发展") == "Hans"
    assert chinese_script("這個國家的發展") == "Hant"
    assert identify("這個國家的經濟發展得很快，人民的生活也越來越好。").script == "Hant"
    assert identify(SENTENCES["zh"]).script == "Hans"
    assert identify(SENTENCES["ja"]).script == "Jpan"


def test_a_long_text_is_judged_by_all_of_it():
    assert identify("Cookies akzeptieren und weiter. " + SENTENCES["en"] * 60).lang == "en"
