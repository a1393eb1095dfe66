VERSION = 0
def chats(n, seed):
    for i in range(n): yield {"messages":[{"role":"user","content":f"What is {i%97} + {i%89}?"},{"role":"assistant","content":str(i%97+i%89)}]}
def pairs(n, seed):
    for i in range(n): yield {"prompt":[{"role":"user","content":f"What is {i%97} + {i%89}?"}],"chosen":str(i%97+i%89),"rejected":str(i)}
def prompts(n, seed):
    for i in range(n): yield {"prompt":f"What is {i%97} + {i%89}?","answer":str(i%97+i%89)}
def texts(n, seed):
    for i in range(n): yield {"text":f"{i%97} + {i%89} = {i%97+i%89}\n"}
