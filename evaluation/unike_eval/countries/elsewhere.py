"""What has nothing to do with facts about countries: questions and free text that an edit of one must not change."""

from __future__ import annotations

from unike_kernels.training.samples import Sample

from .wordings import Split


def _samples(lines: str) -> tuple[Sample, ...]:
    r"""A prompt and an answer a line, with "\n" in words where a prompt breaks its line."""
    return tuple(Sample(*line.replace("\\n", "\n").split(" | ")) for line in lines.strip().split("\n"))


FAR = _samples(r"""
Water is made of hydrogen and | oxygen
The opposite of hot is | cold
The sun rises in the | east
Two plus two equals | four
The author of Hamlet is William | Shakespeare
A baby cat is called a | kitten
The largest planet in the solar system is | Jupiter
The colour of grass is | green
Q: How many days are there in a week?\nA: | Seven
A triangle has three | sides
The general who crossed the Delaware was George | Washington
Bees make | honey
Question: Which animal barks?\nAnswer: | A dog
The past tense of go is | went
The chemical symbol of gold is | Au
The hardest natural material is | diamond
The theory of relativity is by Albert | Einstein
A spider has eight | legs
The Mona Lisa was painted by Leonardo da | Vinci
The planet that we live on is | Earth
In winter it often | snows
The plural of mouse is | mice
Sherlock Holmes lives in Baker | Street
To see far away things one uses a | telescope
The opposite of big is | small
A baby dog is called a | puppy
The first month of the year is | January
The boiling point of water is 100 degrees | Celsius
Romeo loves | Juliet
Q: How many legs does a horse have?\nA: | Four
The closest star to the Earth is the | Sun
Milk comes from | cows
Ten minus three equals | seven
A square has four | sides
Question: Which bird cannot fly and lives in the cold?\nAnswer: | The penguin
The chemical symbol of iron is | Fe
The plural of child is | children
The organ that pumps blood is the | heart
The origin of species is by Charles | Darwin
In autumn the leaves | fall
The past tense of see is | saw
A person who bakes bread is a | baker
Moby Dick is about a white | whale
The fastest land animal is the | cheetah
To cut paper one uses | scissors
The instrument with black and white keys is the | piano
Harry Potter was written by J. K. | Rowling
The colour of a ripe banana is | yellow
""")

TEXT = _samples("""
Once upon a time there was a little girl who | lived in a village near the forest.
The recipe says that you should first | heat the oven and then mix the flour with butter.
Dear Sir or Madam, I am writing to | ask about the position that you advertised.
In this paper we show that | the method is faster than all earlier ones.
The train was late again, so | we had to wait on the platform in the rain.
To install the program, | download the file and open it.
She opened the letter and | read it twice before she said a word.
The committee decided to | meet again in the following week.
When the rain stopped, the children | ran out to play in the garden.
Before you paint a wall, you should | clean it well and let it dry.
Thank you for your message. I will | be back in the office on Monday.
The experiment was repeated three times, and | the results were the same in each case.
After a long walk up the hill, we | sat down and looked at the valley.
If the lamp does not light, | check the plug and the bulb.
He put the book on the table and | went to the kitchen to make tea.
The meeting was opened by | the head of the school, who welcomed all guests.
""")


def of_split(samples: tuple[Sample, ...], split: Split) -> tuple[Sample, ...]:
    """A third of them, which no other split has."""
    return samples[("train", "validation", "test").index(split) :: 3]
