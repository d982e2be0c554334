"""Whether an answer follows a text after a space or at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subjattn.prompts.spacing import answered, space_between


AT_ONCE = [
    ("东京是哪个国家的城市？答案是：", "日本"),
    ("东京是哪个国家的城市？答案是", "日本"),
    ("东京在哪个国家?", "日本"),
    ("答案:", "日本"),
    ("答案：", "Kenya"),
    ("答案：", "B"),
    ("答案是", "Kenya"),
    ("問題1", "日本"),
    ("首都は", "東京"),
    ("首都は", "トウキョウ"),
    ("首都はﾄｳｷｮｳー", "東京"),
    ("首都是“", "东京"),
    ("首都是「", "东京"),
    ("首都是「东京」。", "对"),
    ("首都是(", "东京"),
    ("เมืองหลวงของไทยคือ", "กรุงเทพ"),
    ("เมืองหลวงของไทยคือ่", "กรุงเทพ"),
    ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", "ວຽງຈັນ"),
    ("រាជធានី​នៃ​កម្ពុជា​គឺ", "ភ្នំពេញ"),
    ("မြို့တော်သည်", "ရန်ကုန်"),
    ("བོད་ཀྱི་རྒྱལ་ས་ནི་", "ལྷ་ས"),
    ("답：", "서울"),
    ('The capital of Kenya is "', "Nairobi"),
    ('The capital of "Kenya" is "', "Nairobi"),
    ('The capital of 5" pipes is "', "Nairobi"),
    ('{"city":"Kenya","capital":"', "Nairobi"),
    ('{"city": "Kenya", "capital": "', "Nairobi"),
    ('首都是"', "东京"),
    ("The capital of Kenya is '", "Nairobi"),
    ("The boys' capital is '", "Nairobi"),
    ("Kenya's capital is '", "Nairobi"),
    ("The capital of “Kenya” is “", "Nairobi"),
    ("Die Hauptstadt von „Kenia“ ist „", "Nairobi"),
    ("La capitale du « Kenya » est «", "Nairobi"),
    ("Hovedstaden i »Kenya« er »", "Nairobi"),
    ("Huvudstaden i ”Kenya” är ”", "Nairobi"),
    ("The capital is (", "B"),
    ("The capital is [", "B"),
    ("The capital is {", "B"),
    ("The capital is **", "Nairobi"),
    ("**Capital of Kenya:** **", "Nairobi"),
    ("The capital is `", "Nairobi"),
    ("<country>Kenya</country><capital>", "Nairobi"),
    ("<|user|>Kenya<|assistant|>", "Nairobi"),
    ("Le pays est l'", "Italie"),
    ("Le pays est l’", "Italie"),
    ("La capital es ¿", "Nairobi"),
    ("The price is $", "5"),
    ("The price is US$", "5"),
    ("The price is €", "5"),
    ("The hashtag is #", "Nairobi"),
    ("Mail to @", "nairobi"),
    ("Kenya/", "Nairobi"),
    ("Kenya-", "Nairobi"),
    ("Kenya—", "Nairobi"),
    ("capital=", "Nairobi"),
    ("Kenya->", "Nairobi"),
    ("Kenya→", "Nairobi"),
    ('בירת קניה היא "', "ניירובי"),
    ("בירת קניה היא (\u200f", "ניירובי"),
    ("عاصمة كينيا هي «", "نيروبي"),
    ("<|assistant|>\n", "Nairobi"),
    ("答案：\u3000", "Kenya"),
    ("", "Nairobi"),
]
AFTER_A_SPACE = [
    ("The capital of Kenya is", "Nairobi"),
    ("Country: Kenya\nCapital:", "Nairobi"),
    ("Answer:", "日本"),
    ("The capital of Japan is", "東京"),
    ("Q: 东京在哪个国家？\nA:", "日本"),
    ("答案:", "Kenya"),
    ("เมืองหลวงของเคนยาคือ", "Nairobi"),
    ("รหัสคือ", "42"),
    ("케냐의 수도는", "나이로비"),
    ("일본의 수도는", "東京"),
    ("Столица Кении —", "Найроби"),
    ("Столица Кении", "Найроби"),
    ("Η πρωτεύουσα είναι", "Ναϊρόμπι"),
    ("केन्या की राजधानी है", "नैरोबी"),
    ("عاصمة كينيا هي", "نيروبي"),
    ("عاصمة كينيا:", "نيروبي"),
    ("בירת קניה היא", "ניירובי"),
    ('בירת ישראל לפי צה"ל היא', "ירושלים"),
    ('The capital of "Kenya"', "Nairobi"),
    ('He said: "Tell me.\nThe capital of Kenya."', "Nairobi"),
    ('The capital of " Kenya "', "Nairobi"),
    ("The capital of 'Kenya'", "Nairobi"),
    ("The capital of the United States'", "Washington"),
    ("Die Hauptstadt von „Kenia“", "Nairobi"),
    ("La capitale du « Kenya »", "Nairobi"),
    ("The capital of “Kenya”", "Nairobi"),
    ("The capital (of Kenya)", "Nairobi"),
    ("**Kenya**", "Nairobi"),
    ("**Kenya:**", "Nairobi"),
    ("`Kenya`", "Nairobi"),
    ("<b>Kenya</b>", "Nairobi"),
    ("[INST] Kenya [/INST]", "Nairobi"),
    ("Kenya -", "Nairobi"),
    ("Kenya –", "Nairobi"),
    ("Kenya /", "Nairobi"),
    ("Kenya ->", "Nairobi"),
    ("capital =", "Nairobi"),
    ("| Kenya |", "Nairobi"),
    ("Capitals:\n-", "Nairobi"),
    ("Capitals:\n*", "Nairobi"),
    ("Capitals:\n#", "Nairobi"),
    ("The capital is ____", "Nairobi"),
    ("It costs 5 €", "Nairobi"),
    ("C#", "Nairobi"),
    ("Is it Kenya?", "Nairobi"),
    ("Flag: 🇰🇪", "Nairobi"),
    ("Flag: ☀️", "Nairobi"),
    ("Cafe\u0301", "Nairobi"),
]


@pytest.mark.parametrize(("text", "answer"), AT_ONCE)
def test_an_answer_follows_at_once(text: str, answer: str) -> None:
    assert answered(text, answer) == text + answer


@pytest.mark.parametrize(("text", "answer"), AFTER_A_SPACE)
def test_an_answer_follows_after_a_space(text: str, answer: str) -> None:
    assert answered(text, answer) == f"{text} {answer}"


SPACED = st.sampled_from(["is", "—".join("ab"), "столица", "είναι", "هي", "היא", "है", "수도는", "é", "cafe\u0301"])
DENSE = st.sampled_from(["首都是", "首都は", "トウキョウ", "々", "答案：", "。", "「", "）"])
LOOSE = st.sampled_from(["คือ", "ແມ່ນ", "គឺ", "သည်", "ནི་"])
ANSWER = st.sampled_from(["Nairobi", "日本", "パリ", "กรุงเทพ", "서울", "ניירובי", "42", "B", "(Nairobi", "'s"])
BEHIND = st.sampled_from(["", "\u200b", "\u200f", "\u2060"])


@given(st.text(), SPACED, BEHIND, ANSWER)
def test_a_word_of_a_spaced_script_is_parted_from_any_answer(before: str, word: str, mark: str, answer: str) -> None:
    assert space_between(f"{before} {word}{mark}", answer) == " "


@given(st.text(), DENSE, BEHIND, ANSWER)
def test_chinese_and_japanese_are_not(before: str, word: str, mark: str, answer: str) -> None:
    assert space_between(before + word + mark, answer) == ""


@given(st.text(), LOOSE, ANSWER)
def test_thai_and_its_like_are_parted_from_other_scripts(before: str, word: str, answer: str) -> None:
    assert space_between(before + word, answer) == ("" if answer in ("日本", "パリ", "กรุงเทพ") else " ")


@given(st.text(), st.text(min_size=1))
def test_nothing_but_a_space_is_ever_put_between(text: str, answer: str) -> None:
    assert answered(text, answer) in (text + answer, f"{text} {answer}")
