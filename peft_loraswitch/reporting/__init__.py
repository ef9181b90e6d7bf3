"""Which expert each token of a text gets, for people to look at.

`routes.py` says what is known of a token, a text and all of them; `terminal.py` and `web_page.py` show it, with the colours of
`colours.py`; `report.py` (`routing_report`) has the model read texts and puts it together; `route_command.py` is
`python -m peft_loraswitch route`.
"""
