import pytest

from qwench.data.pii import PiiRules, scrub


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("mail a.b+c@sub.mail.org.", "mail <EMAIL>."),
        ("<x_1@host.museum>, y@host.de", "<<EMAIL>>, <EMAIL>"),
        ("地址：name@mail.cn。", "地址：<EMAIL>。"),
        ("from 8.8.8.8:53 to 93.184.216.34", "from <IP_ADDRESS>:53 to <IP_ADDRESS>"),
        ("2a00:1450:4001:81b::200e and 2001:db8:0:1:1:1:1:1", "<IP_ADDRESS> and <IP_ADDRESS>"),
        ("call +49 30 1234567 or +1-202-555-0143", "call <PHONE> or <PHONE>"),
        ("(415) 555-2671, 415-555-2671", "<PHONE>, <PHONE>"),
        ("Tel.: 030 / 123 456 78", "Tel.: <PHONE>"),
        ("电话：13812345678，手机: 138-1234-5678", "电话：<PHONE>，手机: <PHONE>"),
        ("key AKIAABCDEFGHIJKLMNOP end", "key <KEY> end"),
        ("token=ghp_" + "a1B2" * 9, "token=<KEY>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----", "<KEY>"),
    ],
)
def test_what_is_replaced(text, clean):
    scrubbed, counts = scrub(text, PiiRules())
    assert scrubbed == clean
    assert counts.total() == clean.count("<EMAIL>") + clean.count("_ADDRESS>") + clean.count("<PHONE>") + clean.count(
        "<KEY>"
    )
    assert scrub(scrubbed, PiiRules()) == (scrubbed, {})


@pytest.mark.parametrize(
    "text",
    [
        "name@example.com",
        "git@github.com:owner/repo.git",
        "a @ b",
        "@decorator",
        "user@localhost",
        "127.0.0.1 192.168.0.1 10.1.2.3",
        "version 1.2.3.4 and v1.2.3.4",
        "256.1.1.1",
        "1.2.3.4.5",
        "1.02.3.4",
        "::1",
        "std::vector::size",
        "12:30:45:10",
        "1999-2003 and 2020-10-11 12:30",
        "978-3-16-148410-0",
        "3.14159265 1 234 567 890",
        "No. 123456789",
        "a+1234567890",
        "sk-learn",
        "10.1000/182",
    ],
)
def test_what_is_not(text):
    assert scrub(text, PiiRules()) == (text, {})


def test_numbers_in_code_stay_and_every_kind_can_be_off():
    text = "x@mail.org +49 30 1234567 8.8.8.8 AKIAABCDEFGHIJKLMNOP"
    assert scrub(text, PiiRules(), numbers_are_data=True)[0] == "<EMAIL> +49 30 1234567 <IP_ADDRESS> <KEY>"
    assert scrub(text, PiiRules(email=False, ip=False, phone=False, key=False)) == (text, {})
    assert scrub(text, PiiRules(ip=False))[1] == {"email": 1, "phone": 1, "key": 1}
