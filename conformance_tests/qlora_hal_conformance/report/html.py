"""placeholder"""
def html_text(document, results):
    return "<html></html>"
